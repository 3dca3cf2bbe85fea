"""How far training has moved a network from the pretrained one.

    python -m study.representations results/cifar10-fc+layer4-*/epoch10.pt

For each stage that learned: how alike its features of the test pictures are to
the pretrained one's (CKA), and how far its weights are from those it began with.
Written beside the checkpoint, too: epoch10.representations.csv.
"""

from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

import freeze
from data import UserError
from plumbing import datasets, machine, weights
from plumbing.cli import Parser, command, paths
from plumbing.files import fingerprint, write_rows
from plumbing.flags import folder
from plumbing.report import prepared
from plumbing.weights import Trained, load_model, read_checkpoint


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """How alike two networks' features of the same N images are, [N, channels] each: linear
    centered kernel alignment, from 0 to 1 (the same but for rotation and scale). Kornblith et al.
    2019, "Similarity of Neural Network Representations Revisited", arXiv:1905.00414, section 3."""
    x, y = x - x.mean(0), y - y.mean(0)
    return ((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def drift(now: nn.Module, before: nn.Module) -> float:
    """The norm of the difference of all parameters of a stage, over their norm before training."""
    start = torch.cat([parameter.detach().cpu().flatten() for parameter in before.parameters()])
    end = torch.cat([parameter.detach().cpu().flatten() for parameter in now.parameters()])
    return ((end - start).norm() / start.norm()).item()


@torch.inference_mode()
def stage_features(model: nn.Module, pixels: torch.Tensor, trained: Trained) -> dict:
    """By stage before the head, its output in eval mode, averaged over the picture: float64
    [N, channels]. trained: whose device, precision and image size to take."""
    *backbone, _ = freeze.stages(model.to(trained.device).eval()).items()
    features = {name: [] for name, _ in backbone}
    for x in prepared(pixels, trained.image_size, trained.device):
        for name, stage in backbone:
            with machine.autocast(trained.device, trained.precision):
                x = stage(x)
            features[name].append(x.float().mean((2, 3)).cpu().double())
    return {name: torch.cat(batches) for name, batches in features.items()}


def report(path: Path, checkpoint: dict, args: Namespace) -> None:
    """Print and write both numbers for every stage that learned. Raises UserError."""
    settings, metadata = checkpoint["settings"], checkpoint["metadata"]
    asked = Namespace(weights=metadata["weights"], model=settings["model"], seed=settings["seed"])
    pretrained = weights.pretrained(asked, settings["classes"])
    if fingerprint(*pretrained.state_dict().values()) != settings["initial_network"]:
        raise UserError(f"{metadata['weights']} is not what the run began with")
    trained = load_model(checkpoint, args.device)
    pixels = datasets.TestSets().of(checkpoint, args.data_dir).pixels
    now = stage_features(trained.model, pixels, trained)
    before = stage_features(pretrained, pixels, trained)
    rows = []
    for stage in settings["strategy"].split("+")[1:]:
        cka = linear_cka(now[stage], before[stage])
        moved = drift(freeze.stages(trained.model)[stage], freeze.stages(pretrained)[stage])
        rows.append({"stage": stage, "cka": cka, "drift": moved})
        print(f"{stage:<8} CKA {cka:.4f}, weights moved by {moved:.2%} of their norm")
    write_rows(path.with_suffix(".representations.csv"), rows, ("stage", "cka", "drift"))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="epochN.pt files of train.py")
    add("--data-dir", type=folder, metavar="DIR", help="where the data set is now")
    add("--device", type=machine.device_flag, help="default: as in training")
    args = parser.parse_args(argv)
    for path in paths(args.checkpoints):
        print(path)
        report(Path(path), read_checkpoint(path), args)


if __name__ == "__main__":
    command(main, when_stopped="what is said is written", when_full="try --device cpu")
