"""Compare runs of train.py by what they logged, without scoring again.

    python compare.py results/*/epoch10.pt                      # the table, the verdict
    python compare.py results/*/epoch*.pt --csv results/summary.csv
    python compare.py results/*/epoch10.pt --paired results/paired.csv  # every two runs

Runs tested on the same images are compared image by image: that error is much
smaller than that of either accuracy. The verdict says which strategy wins, by
how much, and whether that is more than chance.
"""

import plumbing  # isort: skip  # noqa: F401  # before torch, for whose threads it sets something
import itertools
import sys
from pathlib import Path

from data import UserError
from plumbing.cli import Parser, command, paths
from plumbing.files import writable, write_rows
from plumbing.report import print_row
from plumbing.verdict import Runs, difference, spreads, verdict
from plumbing.weights import read_checkpoint, summary_row


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="epochN.pt files of train.py")
    add("--csv", type=writable, metavar="FILE", help="write a row per checkpoint to this file")
    add("--paired", type=writable, metavar="FILE", help="write a row per pair to this file")
    args = parser.parse_args(argv)
    runs, failed = [], False
    for path in paths(args.checkpoints):
        try:
            checkpoint = read_checkpoint(path)
            row = summary_row(path, checkpoint, checkpoint["scores"])
            print_row(row, header=not runs or row.keys() != runs[-1][0].keys())
            runs.append((row, checkpoint))
        except UserError as error:  # the others are compared all the same
            print(f"compare.py: error: {error}", file=sys.stderr, flush=True)
            failed = True
    if not runs:
        sys.exit(2)
    if args.csv:
        write_rows(args.csv, [row for row, _ in runs])
    for line in spreads(runs):
        print(line)
    said, left_out = verdict(runs)
    if args.paired or not said:
        report_pairs(args.paired, runs)
    print(said + left_out, end="")
    if failed:
        sys.exit(2)


def report_pairs(file: Path | None, runs: Runs) -> None:
    """Print, and write to `file`, every comparison of two runs on the same test images."""
    pairs = []
    for (other, before), (row, saved) in itertools.combinations(runs, 2):
        if before["settings"]["test_data"] != saved["settings"]["test_data"]:
            continue
        right, other_right = saved["test_correct"], before["test_correct"]
        more, error, _ = difference(right[None], other_right[None])
        only, only_other = (right & ~other_right).sum().item(), (other_right & ~right).sum().item()
        print(f"\n{row['run']}, {row['epochs']} epochs\nagainst {other['run']}, {other['epochs']}:")
        print(f"  {100 * more:+.2f} ± {100 * error:.2f} points; of {len(right):,} images", end=" ")
        print(f"{only:,} right here alone, {only_other:,} there alone")
        pair = {"run": row["run"], "epochs": row["epochs"]}
        pair |= {"other": other["run"], "other_epochs": other["epochs"]}
        pair |= {"difference": more, "standard_error": error}
        pair |= {"only_run_right": only, "only_other_right": only_other, "test_images": len(right)}
        pairs.append(pair)
    if file and not pairs:
        raise UserError("--paired takes two checkpoints or more, of the same test images")
    if file:
        write_rows(file, pairs)


if __name__ == "__main__":
    command(main, when_stopped="the tables are written at the end", when_full="compare fewer runs")
