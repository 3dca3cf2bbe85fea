"""Compare runs of train.py by what they logged, without scoring again.

    python compare.py results/*/epoch10.pt                      # the table, the verdict
    python compare.py results/*/epoch*.pt --csv results/summary.csv
    python compare.py results/*/epoch10.pt --paired results/paired.csv  # every two runs

Runs tested on the same images are compared image by image: that error is much
smaller than that of either accuracy. The verdict says which strategy wins, by
how much, and whether that is more than chance.
"""

import plumbing  # noqa: F401  # before torch, for whose threads it sets something

# isort: split
import itertools
import sys
from argparse import Namespace
from pathlib import Path

from data import UserError
from plumbing.cli import Parser, command, output, paths
from plumbing.files import check_writable, write_csv, write_rows
from plumbing.report import print_row
from plumbing.verdict import paired, spreads, verdict
from plumbing.weights import read_checkpoint, summary_row

PAIRED = ("run", "epochs", "other", "other_epochs", "difference", "standard_error")
PAIRED += ("only_run_right", "only_other_right", "test_images")


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="epochN.pt files of train.py")
    add("--csv", type=output, metavar="FILE", help="write a row per checkpoint to this file")
    add("--paired", type=output, metavar="FILE", help="write a row per pair to this file")
    # fmt: on
    args = parser.parse_args(argv)
    args.checkpoints = paths(args.checkpoints)
    if args.paired and len(args.checkpoints) < 2:
        raise UserError("--paired takes two checkpoints or more")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    for file in (args.csv, args.paired):
        if file:
            check_writable(file)
    runs, rows, failed = [], [], False
    for path in args.checkpoints:
        try:
            checkpoint = read_checkpoint(path)
            row = summary_row(path, checkpoint, checkpoint["scores"])
            print_row(row, header=not rows or row.keys() != rows[-1].keys())
            rows.append(row)
            runs.append(checkpoint)
        except UserError as error:  # said, and the others compared all the same
            print(f"compare.py: error: {error}", file=sys.stderr, flush=True)
            failed = True
    if args.csv and rows:
        write_rows(args.csv, rows)
    for line in spreads(rows, runs):
        print(line)
    lines = list(verdict(rows, runs))
    if args.paired or not lines:
        report_pairs(args.paired, rows, runs)
    for line in lines:
        print(line)
    if failed:
        sys.exit(2)


# ---------------------------------------------------------------- image by image


def report_pairs(file: Path | None, rows: list[dict], checkpoints: list[dict]) -> None:
    """Print, and write to `file`, every comparison of two runs on the same test images."""
    pairs = []
    both = list(zip(rows, checkpoints))
    for (other, second), (row, first) in itertools.combinations(both, 2):
        if first["settings"]["test_data"] == second["settings"]["test_data"]:
            figures = paired(first["test_correct"], second["test_correct"])
            names = row["run"], row["epochs"], other["run"], other["epochs"]
            pairs.append((*names, *figures, row["test_images"]))
    if file and not pairs:
        raise UserError("--paired takes two checkpoints or more, of the same test images")
    for run, epochs, other, other_epochs, difference, error, only, only_other, count in pairs:
        print(f"\n{run}, {epochs} epochs\nagainst {other}, {other_epochs}:")
        print(f"  {100 * difference:+.2f} ± {100 * error:.2f} points; of {count:,} images", end=" ")
        print(f"{only:,} right here alone, {only_other:,} there alone")
    if file:
        write_csv(file, PAIRED, pairs)


if __name__ == "__main__":
    command(
        main,
        when_stopped="the tables are written at the end, not before",
        when_full="try --device cpu",
    )
