"""From a checkpoint of train.py to a network, and to a row of a CSV file.

checkpoint = read_checkpoint("results/cifar10-fc+layer4-bf16-s0/epoch10.pt")
trained = load_model(checkpoint)
answers = trained.model(transform(pixels, trained.image_size)).argmax(1)
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import freeze
from data import UserError
from plumbing.convolution import use_fast_convolutions
from plumbing.machine import memory_is_full, pick_device, pick_precision
from plumbing.settings import Settings

NEEDED = {"settings", "metadata", "history", "model", "seconds", "test_correct"}


def read_checkpoint(path: str | Path) -> dict:
    """What train.py saved, on the CPU. Raises UserError naming the file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"no checkpoint {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    except Exception as error:  # torch.load meets a foreign file with many kinds of errors
        if memory_is_full(error):
            raise
        raise UserError(f"{path} is damaged, or no checkpoint of train.py") from error
    content = checkpoint if isinstance(checkpoint, dict) else {}
    if "arguments" in content or "facts" in content:
        old = "was written by an earlier version, which knew less of a run"
        raise UserError(f"{path} {old}: train it again to use it here")
    if content.keys() >= NEEDED:
        return content
    if any(str(name).endswith(".weight") for name in content):
        what = "holds weights alone, no checkpoint of train.py"
        raise UserError(f"{path} {what}: start a run from it, with train.py --weights {path}")
    raise UserError(f"{path} is no checkpoint of train.py")


def summary_row(path: str | Path, checkpoint: dict, scores: dict[str, float]) -> dict:
    """A checkpoint's row of summary.csv: the run and its settings, its length, what came out.
    seconds, device and the versions are those of its training."""
    settings = Settings(**checkpoint["settings"])
    last, metadata = checkpoint["history"][-1], checkpoint["metadata"]
    row = {"run": Path(path).resolve().parent.name, "epochs": last["epoch"]} | settings.row()
    row |= {"train_images": metadata["train_images"]}
    row |= {"test_images": len(checkpoint["test_correct"]), "train_loss": last["train_loss"]}
    row |= scores
    row["trainable_parameters"] = metadata["trainable_parameters"]
    row |= {"seconds": checkpoint["seconds"], "device": metadata["device"]}
    return row | {"torch": metadata["torch"]}


class Trained(NamedTuple):
    """A checkpoint's whole network, on a device."""

    model: nn.Module
    checkpoint: dict
    classes: tuple[str, ...]
    image_size: int
    device: torch.device
    precision: str


def load_model(
    checkpoint: dict, device: str | None = None, precision: str | None = None
) -> Trained:
    """The network, rebuilt from nothing else, on the device and in the precision of its training
    unless others are asked for. Raises UserError for a device that is not there."""
    settings = checkpoint["settings"]
    where = pick_device(device or checkpoint["metadata"]["device_type"])
    how = pick_precision(precision or settings["precision"], where)
    if how == "bf16" and not precision and pick_precision("auto", where) == "fp16":
        how = "fp16"  # a card that emulates bf16 slowly
    model = freeze.build(settings["model"], len(settings["classes"]))
    model.load_state_dict(checkpoint["model"])
    use_fast_convolutions(model)
    known = settings["classes"], settings["image_size"]
    return Trained(model.to(where), checkpoint, *known, where, how)
