"""How good a network's answers are, and what a run looks like on the screen, in 80 columns."""

import math
import textwrap
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

import freeze
from data import Images, transform
from features import Features
from plumbing import distributed
from plumbing.cli import progress, wipe_line
from plumbing.distributed import Splits
from plumbing.machine import autocast, device_name
from plumbing.settings import Settings

MANY_EPOCHS, SHORT_SECONDS = 20, 10  # a run of more epochs that are shorter shows one in ten
USUAL = ("loss", "accuracy", "images", "share", "seed")  # printed elsewhere, or no metrics


def metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """How good answers are, by name: each is a column of history.csv and summary.csv, with test_ or
    val_ before it. logits: float32 [N, classes]; labels: int64 [N]. The loss is the mean
    cross-entropy in nats, whatever LOSS in train.py is."""
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
    """How many images are tested at a time: on a GPU at most eight training batches, and at most
    1,024 of 224x224 (an H200 tests 11,000 in 16 ms, in batches of 128 in 83). In each batch as
    many, as cuDNN searches for every size."""
    if device.type != "cuda":
        return 128
    most = min(8 * settings.batch_size, int(1024 * min(1, (224 / settings.image_size) ** 2)))
    return math.ceil(images / math.ceil(images / most))


def score_epoch(
    tail: nn.Module,
    inputs: dict[str, Features],
    images: dict[str, Images],
    settings: Settings,
    device: torch.device,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """After an epoch: the metrics, as test_loss, ...; and which images are right, bool [images]."""
    distributed.average_batchnorm(tail)
    scores, correct = {}, {}
    for split, split_images in images.items():
        size = test_batch(len(inputs[split]), settings, device)
        count = math.ceil(len(inputs[split]) / size)
        batches = progress(inputs[split].batches(size), f"{split} pictures, batch", count)
        logits = predict(tail, batches, device, settings.precision)
        labels = split_images.labels.to(device)
        logits = distributed.all_gather(logits, len(labels))
        for name, value in metrics(logits, labels).items():
            scores[f"{split}_{name}"] = value
        correct[split] = logits.argmax(1) == labels
    return scores, correct


def print_setup(run, model: nn.Module, images: Splits, device: torch.device) -> None:
    """What a plumbing.run.Run is about to do: where, on which pictures, which stages learn, ..."""
    print(run.folder)
    others = [f"{len(split.labels):,} {name}" for name, split in images.watched().items()]
    print(f"data     {images.train_images:,} train and {' and '.join(others)} images")
    print_classes(images.train)
    frozen = "frozen"
    if run.settings.frozen_batchnorm == "train":
        frozen = "frozen, BatchNorm in train mode"
    print(f"{'stage':<8} {'parameters':>12}")
    for name, stage in freeze.stages(model).items():
        count = sum(parameter.numel() for parameter in stage.parameters())
        rate = run.settings.rates.get(name)
        says = f"learns at {rate:g}" if rate else frozen
        print(f"{name:<8} {count:>12,}  {says}")
    text = f"device   {device_name(device)}, {run.settings.precision}"
    if run.args.device == "auto" and device.type != "cuda":
        text += ", no CUDA GPU"
    print(text, flush=True)


def print_classes(images: Images) -> None:
    """Of which classes the images are, and how unequal these are."""
    classes, counts = images.classes, torch.bincount(images.labels, minlength=len(images.classes))
    text = f"{len(classes)} classes: {', '.join(classes[:10])}"
    if len(classes) > 10:
        text += f" and {len(classes) - 10} more"
    small, large = counts.argmin(), counts.argmax()
    if counts[small] < counts[large]:
        text += f"; from {counts[small]:,} of {classes[small]} to {counts[large]:,} of "
        text += classes[large]
    print(textwrap.indent(textwrap.fill(text, 70), " " * 9))


def print_epoch(row: dict, last: int, header: bool) -> None:
    """A row of history.csv; of many short epochs one in ten."""
    wipe_line()
    epoch, seconds = row["epoch"], row["seconds"]
    if header:
        print(f"    epoch  train loss  accuracy {split_of(row) + ' loss':>11}  accuracy   seconds")
    short = last > MANY_EPOCHS and seconds < SHORT_SECONDS
    if short and epoch not in (1, last) and epoch % 10:
        return
    found = figures(row)
    more = "".join(f"  {name} {value:.4g}" for name, value in found.items() if name not in USUAL)
    numbers = f"{row['train_loss']:11.4f} {row['train_accuracy']:9.2%} {found['loss']:11.4f}"
    numbers += f" {found['accuracy']:9.2%} {seconds:9.1f}"
    print(f"{epoch:4}/{last:<4} {numbers}{more}", flush=True)


def split_of(row: dict) -> str:
    """On which pictures strategies are chosen; row: of history.csv or summary.csv."""
    return "val" if "val_accuracy" in row else "test"


def figures(row: dict) -> dict[str, float]:
    """What a row of history.csv or summary.csv says of these pictures, by the metric's name."""
    names = [name for name in row if name.startswith(f"{split_of(row)}_")]
    return {name.partition("_")[2]: row[name] for name in names}


def print_time_left(seconds: float) -> None:
    """After a run's first epoch: how long the others will take, and what is quicker."""
    if seconds >= 3600:
        print(f"         about {seconds / 3600:.1f} hours to go")
        print("         quicker: a GPU, --train-size 5000, or --image-size 112")
    elif seconds >= 60:
        print(f"         about {seconds / 60:.0f} minutes to go")


def print_row(row: dict, header: bool) -> None:
    """A row of summary.csv, for evaluate.py and compare.py."""
    found = figures(row)
    more = {name: value for name, value in found.items() if name not in USUAL}
    if header:
        others = "".join(f"{name:>10}" for name in more)
        print(f"train loss {split_of(row) + ' loss':>10}   accuracy  images  epochs{others}  run")
    others = "".join(f"{value:10.4g}" for value in more.values())
    numbers = f"{row['train_loss']:10.4f} {found['loss']:10.4f} {found['accuracy']:10.2%}"
    numbers += f" {found['images']:7,} {row['epochs']:7}{others}"
    print(f"{numbers}  {row['run']}", flush=True)
