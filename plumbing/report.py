"""How good a network's answers are, and what a run looks like on the screen, in 80 columns."""

import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

import freeze
from data import Images, transform
from features import Features
from plumbing import distributed
from plumbing.cli import progress, wipe_line
from plumbing.machine import autocast, device_name
from plumbing.settings import Settings

if TYPE_CHECKING:  # these import torchvision, which takes seconds
    from plumbing.datasets import Splits
    from plumbing.run import Run

MANY_EPOCHS, SHORT_SECONDS = 20, 10  # a run of so many epochs that are so short shows one in ten


# ---------------------------------------------------------------- scores


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


# ---------------------------------------------------------------- the screen


def print_setup(run: "Run", model: nn.Module, images: "Splits", device: torch.device) -> None:
    """What a run is about to do: where, on which pictures, which stages learn, on what device."""
    print(run.folder)
    others = [f"{len(split.labels):,} {name}" for name, split in images.watched().items()]
    print(f"data     {images.train_images:,} train and {' and '.join(others)} images")
    print_classes(images.train)
    rates, frozen = run.settings.rates, "frozen"
    if run.settings.frozen_batchnorm == "train":
        frozen = "frozen, BatchNorm in train mode"
    print(f"{'stage':<8} {'parameters':>12}")
    for name, stage in freeze.stages(model).items():
        count = sum(parameter.numel() for parameter in stage.parameters())
        says = f"learns at {rates[name]:g}" if name in rates else frozen
        print(f"{name:<8} {count:>12,}  {says}")
    no_cuda = ""
    if run.args.device == "auto" and device.type != "cuda":
        no_cuda = ", no CUDA GPU"
    print(f"device   {device_name(device)}, {run.settings.precision}{no_cuda}", flush=True)


def print_classes(images: Images) -> None:
    """Of which classes the images are, and how unequal these are."""
    counts = torch.bincount(images.labels, minlength=len(images.classes))
    small, large = counts.argmin(), counts.argmax()
    named = ", ".join(images.classes[:10])
    if len(images.classes) > 10:
        named += f" and {len(images.classes) - 10} more"
    text = f"{len(images.classes)} classes: {named}"
    if counts[small] < counts[large]:
        text += f"; from {counts[small]:,} of {images.classes[small]} to {counts[large]:,} of "
        text += images.classes[large]
    for line in textwrap.wrap(text, 70):
        print(f"         {line}")


def print_header(split: str) -> None:
    """split: what is scored after each epoch, test or val."""
    print(f"    epoch  train loss  accuracy {split + ' loss':>11}  accuracy   seconds", flush=True)


def print_epoch(row: dict, last: int) -> None:
    """A row of history.csv, under print_header's line; of many short epochs one in ten."""
    wipe_line()
    epoch, split = row["epoch"], "val" if "val_loss" in row else "test"
    short = last > MANY_EPOCHS and row["seconds"] < SHORT_SECONDS
    if short and epoch not in (1, last) and epoch % 10:
        return
    usual = {f"{split}_loss", f"{split}_accuracy"}
    others = [name for name in row if name.startswith(f"{split}_") and name not in usual]
    more = "".join(f"  {name.removeprefix(f'{split}_')} {row[name]:.4g}" for name in others)
    print(
        f"{epoch:4}/{last:<4} {row['train_loss']:11.4f} {row['train_accuracy']:9.2%} "
        f"{row[f'{split}_loss']:11.4f} {row[f'{split}_accuracy']:9.2%} {row['seconds']:9.1f}{more}",
        flush=True,
    )


def print_time_left(seconds: float) -> None:
    """After a run's first epoch: how long the others will take, and what is quicker."""
    if seconds < 60:
        return
    duration = f"{seconds / 60:.0f} minutes"
    if seconds >= 2 * 3600:
        duration = f"{seconds / 3600:.0f} hours"
    print(f"         about {duration} to go")
    if seconds >= 3600:
        print("         quicker: a GPU, --train-size 5000, or --image-size 112")


def print_row(row: dict, header: bool) -> None:
    """A row of summary.csv, for evaluate.py and compare.py. Where strategies are chosen on
    validation pictures, theirs are the figures."""
    split = "val" if "val_accuracy" in row else "test"
    usual = ("loss", "accuracy", "correct", "images", "share", "seed", "data")
    names = [name for name in row if name.startswith(f"{split}_")]
    more = [name for name in names if name.removeprefix(f"{split}_") not in usual]
    if header:
        others = "".join(f"{name.removeprefix(f'{split}_'):>10}" for name in more)
        print(f"train loss {split + ' loss':>10}   accuracy  images  epochs{others}  run")
    others = "".join(f"{row[name]:10.4g}" for name in more)
    print(
        f"{row['train_loss']:10.4f} {row[f'{split}_loss']:10.4f} {row[f'{split}_accuracy']:10.2%} "
        f"{row['test_images']:7,} {row['epochs']:7}{others}  {row['run']}",
        flush=True,
    )
