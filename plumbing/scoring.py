"""From a checkpoint to a network, and from a network to its answers."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

import data
import freeze
from plumbing.convolution import faster
from plumbing.machine import autocast, pick_device, pick_precision
from plumbing.terminal import progress


@torch.inference_mode()
def predict(
    model: nn.Module, inputs: Iterable[torch.Tensor], device: torch.device, precision: str
) -> torch.Tensor:
    """Logits, float32 [N, classes] on the device, of a model or a tail in eval mode."""
    model.eval()
    with autocast(device, precision):
        return torch.cat([model(batch).float() for batch in inputs])


def score(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy in [0, 1]; logits [N, classes], labels int64 [N]."""
    right = (logits.argmax(1) == labels).sum().item()
    return F.cross_entropy(logits, labels).item(), right / len(labels)


def prepared(pixels: torch.Tensor, image_size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Images as the network sees them, 128 at a time, with live progress."""
    for start in range(0, len(pixels), 128):
        yield data.transform(pixels[start : start + 128].to(device), image_size)
        progress(f"scoring: {min(start + 128, len(pixels)):,} of {len(pixels):,} images")
    progress()


class Loaded:
    """A checkpoint's whole network, rebuilt from nothing else, on the device and in the precision
    of its training unless others are asked for. Raises UserError for a device that is not there."""

    def __init__(self, checkpoint: dict, device: str | None = None, precision: str | None = None):
        settings = checkpoint["settings"]
        self.checkpoint, self.classes = checkpoint, settings["classes"]
        self.image_size = settings["image_size"]
        self.device = pick_device(device or checkpoint["facts"]["device_type"])
        self.precision = pick_precision(precision or settings["precision"], self.device)
        model = freeze.build(settings["model"], len(self.classes))
        model.load_state_dict(checkpoint["model"])
        self.model = model.to(self.device)
        faster(self.model)
