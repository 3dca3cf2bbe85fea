"""A network's answers, and how good they are."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from data import Images, transform
from features import Features
from plumbing import distributed
from plumbing.cli import progress
from plumbing.machine import autocast
from plumbing.settings import Settings


def metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """What is said of a network's answers, by name: each is a column of history.csv and of
    summary.csv, with test_ or val_ before it. logits: float32 [N, classes]; labels: int64 [N].
    The loss is the mean cross-entropy in nats, whatever LOSS in train.py is."""
    right = (logits.argmax(1) == labels).sum().item()
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": right / len(labels),
    }


@torch.inference_mode()
def predict(
    model: nn.Module, inputs: Iterable[torch.Tensor], device: torch.device, precision: str
) -> torch.Tensor:
    """Logits, float32 [N, classes] on the device, of a model or a tail in eval mode."""
    model.eval()
    with autocast(device, precision):
        return torch.cat([model(batch).float() for batch in inputs])


def prepared(pixels: torch.Tensor, image_size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Images as the network sees them, 128 at a time."""
    for some in progress(pixels.split(128), "scoring, batch"):
        yield transform(some.to(device), image_size)


def test_batch(images: int, settings: Settings, device: torch.device) -> int:
    """How many images are tested at a time: on a GPU some 1,000 of 224x224, all batches alike since
    cuDNN searches for every size anew. An H200 tests 11,000 in 16 ms, 128 at a time in 83."""
    if device.type != "cuda":
        return 128
    most = max(settings.batch_size, int(1024 * min(1, (224 / settings.image_size) ** 2)))
    return -(-images // -(-images // most))


def score_epoch(
    tail: nn.Module,
    inputs: dict[str, Features],
    images: dict[str, Images],
    settings: Settings,
    device: torch.device,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """After an epoch, of each split, test and val: the metrics, as test_loss, ...; and which images
    are right, bool [images]."""
    distributed.average_batchnorm(tail)
    scores, correct = {}, {}
    for split, split_images in images.items():
        size = test_batch(len(inputs[split]), settings, device)
        count = -(-len(inputs[split]) // size)
        batches = inputs[split].batches(size)
        batches = progress(batches, f"{split} pictures, batch", count)
        logits = predict(tail, batches, device, settings.precision)
        labels = split_images.labels.to(device)
        logits = distributed.all_gather(logits, len(labels))
        for name, value in metrics(logits, labels).items():
            scores[f"{split}_{name}"] = value
        correct[split] = logits.argmax(1) == labels
    return scores, correct
