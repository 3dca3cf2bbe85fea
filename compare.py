"""Compare runs of train.py by what they logged, without scoring again.

    python compare.py results/*/epoch10.pt                      # the table, the verdict
    python compare.py results/*/epoch*.pt --csv results/summary.csv
    python compare.py results/*/epoch10.pt --paired results/paired.csv  # every two runs
    python compare.py results/cifar10-fc+layer4-*/epoch10.pt --cka

Runs tested on the same images are compared image by image: that error is much
smaller than that of either accuracy. The verdict says which strategy wins, by
how much, and whether that is more than chance. --cka compares a network's
features with the pretrained one's, and does run the test images through both.
"""

import plumbing  # noqa: F401  # before torch, for whose threads it sets something

# isort: split
import itertools
import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

import freeze
from data import UserError
from plumbing import datasets, machine, weights
from plumbing.command import Parser, command, paths
from plumbing.files import check_writable, fingerprint, write_csv
from plumbing.flags import folder, output
from plumbing.runs import read_checkpoint, summary_row
from plumbing.scoring import Loaded, prepared
from plumbing.terminal import print_row
from plumbing.verdict import paired, spreads, verdict

PAIRED = ("run", "epochs", "other", "other_epochs", "difference", "standard_error")
PAIRED += ("only_run_right", "only_other_right", "test_images")


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="epochN.pt files of train.py")
    add("--csv", type=output, metavar="FILE", help="write a row per checkpoint to this file")
    add("--paired", type=output, metavar="FILE", help="write a row per pair to this file")
    add("--cka", action="store_true",
        help="how alike the features of the stages that learned are to the pretrained ones")
    add("--data-dir", type=folder, metavar="DIR",
        help="for --cka: where the data set is now (default: where it was)")
    add("--device", type=machine.device_flag, help="for --cka (default: as in training)")
    # fmt: on
    args = parser.parse_args(argv)
    args.checkpoints = paths(args.checkpoints)
    if args.paired and len(args.checkpoints) < 2:
        raise UserError("--paired takes two checkpoints or more")
    if not args.cka and (args.data_dir or args.device):
        raise UserError("--data-dir and --device are for --cka: nothing else is computed here")
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
            rows.append(report(path, checkpoint, header=not rows))
            runs.append(checkpoint)
            if args.cka:
                report_cka(Path(path), checkpoint, args)
        except UserError as error:  # said, and the others compared all the same
            print(f"compare.py: error: {error}", file=sys.stderr, flush=True)
            failed = True
    if args.csv and rows:
        write_csv(args.csv, rows[0], [row.values() for row in rows])
    for line in spreads(rows, runs):
        print(line)
    lines = list(verdict(rows, runs))
    if args.paired or not lines:
        report_pairs(args.paired, rows, runs)
    for line in lines:
        print(line)
    if failed:
        sys.exit(2)


def report(path: str, checkpoint: dict, header: bool) -> dict:
    """Print a checkpoint's line of the table, and give its row of the CSV."""
    last = checkpoint["history"][-1]
    row = summary_row(path, checkpoint, last["test_loss"], last["test_accuracy"])
    print_row(row, header)
    return row


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


# ---------------------------------------------------------------- the features


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """How alike two networks' features of the same N images are, [N, channels] each: linear
    centered kernel alignment, from 0 to 1 (the same but for rotation and scale). Kornblith et al.
    2019, "Similarity of Neural Network Representations Revisited", arXiv:1905.00414, section 3."""
    x, y = x - x.mean(0), y - y.mean(0)
    return ((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


@torch.inference_mode()
def stage_features(model: nn.Module, pixels: torch.Tensor, on: Loaded) -> dict[str, torch.Tensor]:
    """Each backbone stage's output in eval mode, in the precision of `on`, averaged over the
    picture: float64 [N, channels] by stage."""
    *backbone, _ = freeze.stages(model.to(on.device).eval()).items()
    parts = {name: [] for name, _ in backbone}
    for x in prepared(pixels, on.image_size, on.device):
        for name, stage in backbone:
            with machine.autocast(on.device, on.precision):
                x = stage(x)
            parts[name].append(x.float().mean((2, 3)).cpu().double())
    return {name: torch.cat(kept) for name, kept in parts.items()}


def report_cka(path: Path, checkpoint: dict, args: Namespace) -> None:
    """Print and write linear CKA with the pretrained network for every stage that learned."""
    settings, facts = checkpoint["settings"], checkpoint["facts"]
    state = weights.load(facts["weights"], settings["model"])
    classes = len(settings["classes"])
    pretrained = freeze.build(settings["model"], classes, state, settings["seed"])
    if fingerprint(*pretrained.state_dict().values()) != settings["initial_network"]:
        what = f"{facts['weights']} is not what the run began with"
        raise UserError(f"{what}: --cka compares with that")
    trained = Loaded(checkpoint, args.device, None)
    pixels = datasets.Once().test_set(checkpoint, args.data_dir).pixels
    now = stage_features(trained.model, pixels, trained)
    before = stage_features(pretrained, pixels, trained)
    rows = [(stage, linear_cka(now[stage], before[stage])) for stage in facts["unfrozen"][:-1]]
    for stage, cka in rows:
        print(f"{'':21} {cka:10.4f}    CKA of {stage} with the pretrained one")
    write_csv(path.with_suffix(".cka.csv"), ["stage", "cka"], rows)


if __name__ == "__main__":
    command(
        main,
        when_stopped="the tables are written at the end, not before",
        when_full="try --device cpu",
    )
