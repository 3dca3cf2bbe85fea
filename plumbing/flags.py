"""train.py's flags, which the benchmark takes too."""

import argparse
import math
import re
from pathlib import Path

import freeze
from data import UserError
from plumbing.cache import PLACES
from plumbing.cli import Parser, whole_number
from plumbing.datasets import DATASETS
from plumbing.machine import PRECISIONS, device_flag


def parse(description: str, recipe: dict, argv: list[str] | None) -> argparse.Namespace:
    """What the user asked for. recipe: the defaults. Raises UserError for an unknown name."""
    parser = Parser(description)
    add = parser.add_argument
    rates = " ".join(f"{stage}={rate:g}" for stage, rate in recipe["rates"].items())
    # fmt: off
    # the experiment
    add("--unfreeze", action="extend", nargs="*", default=[], metavar="STAGE",
        help="stages that learn beside the last one, such as layer3 layer4 (default: none)")
    add("--lr", action="extend", type=stage_rate, nargs="+", default=[], metavar="STAGE=RATE",
        help=f"learning rates other than {rates}")
    add("--epochs", type=whole_number(1), nargs="+",
        help="of several, each leaves a checkpoint (default: %(default)s)")
    add("--tag", type=tag, default="", metavar="NAME",
        help="what you call a variation of the recipe, in the run's name and in every table")
    add("--frozen-batchnorm", choices=["eval", "train"], default="eval",
        help="train: the usual mistake, to see what it costs; nothing is computed once then")
    add("--batch-size", type=whole_number(1), help="default: %(default)s")
    add("--image-size", type=whole_number(32, 4096),
        help="side of the square the network sees (default: %(default)s)")
    add("--seed", type=whole_number(0), default=0,
        help="of fc's initialization, the subset, the order and the flips (default: 0)")
    # what it starts from
    add("--model", choices=freeze.MODELS, metavar="NAME",
        help=f"{', '.join(freeze.MODELS)} (default: %(default)s)")
    add("--weights", type=weights_name, metavar="FILE",
        help="imagenet (default), none, or the path of a state_dict or of an epochN.pt, whose last "
             "layer is kept if the classes are the same")
    add("--dataset", choices=DATASETS, help="default: %(default)s")
    add("--data-dir", type=folder, default="data", metavar="DIR",
        help="where the data set is, or is downloaded to (default: data)")
    add("--train-size", type=whole_number(1), metavar="N",
        help="train on this many images, the same share of every class")
    add("--val-share", type=share, metavar="SHARE",
        help="of the training images, the share to choose epoch and strategy on, as in 0.1")
    add("--test-share", type=share, metavar="SHARE",
        help="of pictures without a test folder, the share to test on, as in 0.2")
    add("--test-seed", type=whole_number(0), default=0,
        help="draws other pictures for both shares (default: 0)")
    # how it runs
    add("--device", type=device_flag, default="auto",
        help="auto (default): CUDA, then MPS, then the CPU; or cpu, mps, cuda, cuda:1")
    add("--precision", choices=["auto", *PRECISIONS], default="auto",
        help="auto (default): the lowest that the device is fast at")
    add("--cache", choices=PLACES, default="auto",
        help="where the frozen prefix's outputs are kept; auto (default): where they fit; disk: in "
             "a file that is gone when the run ends")
    add("--resume", action="store_true",
        help="go on after the last epoch that was kept; leave a finished run as it is")
    add("--out", type=lambda text: Path(text).expanduser(), default="results", metavar="DIR",
        help="the runs' folder (default: results)")
    # fmt: on
    parser.set_defaults(**{name: value for name, value in recipe.items() if name != "rates"})
    args = parser.parse_args(argv)
    if isinstance(args.epochs, int):
        args.epochs = [args.epochs]
    for name, known in {"model": freeze.MODELS, "dataset": DATASETS}.items():
        if getattr(args, name) not in known:
            raise UserError(f"RECIPE: {name} {getattr(args, name)!r} is none of {', '.join(known)}")
    return args


def learning_rates(args: argparse.Namespace, published: dict[str, float]) -> dict[str, float]:
    """By stage that learns, in the order they run; the head always does. Raises UserError."""
    names = freeze.stage_names(args.model)
    for stage in args.unfreeze:
        if stage not in names:
            known = f"{args.model} has {', '.join(names)}"
            raise UserError(f"--unfreeze {stage}: {known}; spaces separate several")
    learning = [name for name in names if name in [*args.unfreeze, names[-1]]]
    rates = published | dict(args.lr)
    for stage, _ in args.lr:
        if stage not in learning:
            learns = " and ".join(learning)
            raise UserError(f"--lr {stage}=...: only what learns has a rate, here {learns}")
    for stage in learning:
        if stage not in rates:
            unknown = f"--unfreeze {stage} has no published rate"
            raise UserError(f"{unknown}: give it one, as in --lr {stage}=1e-6")
    return {stage: rates[stage] for stage in learning}


def folder(text: str) -> Path:
    return Path(text).expanduser().resolve()


def weights_name(text: str) -> str:
    return text if text in ("imagenet", "none") else str(folder(text))


def tag(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]*", text):
        raise argparse.ArgumentTypeError(f"takes letters, digits, _, - and ., not {text!r}")
    return text


def share(text: str) -> float:
    if not 0 < number(text) < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, as in 0.2, not {text!r}")
    return float(text)


def stage_rate(text: str) -> tuple[str, float]:
    stage, _, rate = text.partition("=")
    if not 0 < number(rate) < math.inf:
        wrong = f"{text!r} is not STAGE=RATE with a finite rate above 0, as in fc=0.001"
        raise argparse.ArgumentTypeError(wrong)
    return stage, float(rate)


def number(text: str) -> float:
    """What a text says, or nan, which is within no bounds."""
    try:
        return float(text)
    except ValueError:
        return math.nan
