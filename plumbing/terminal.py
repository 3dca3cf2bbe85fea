"""What a command shows: one line in place while it works, and what it tells of a run."""

import shutil
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

import freeze
from data import Images
from plumbing.machine import device_name

MANY, SHORT = 20, 10  # epochs, and seconds of one, from which and below which not all are shown
last_shown = time.monotonic()  # when progress last wrote


def progress(text: str = "") -> None:
    """Show one line in place on a terminal, ten times a second at most; no text wipes the line.
    Where there is no terminal, a line a minute."""
    global last_shown
    now = time.monotonic()
    terminal = sys.stdout.isatty()
    if text and now - last_shown < (0.1 if terminal else 60):
        return
    last_shown = now
    if not terminal:
        if text:
            print(text, flush=True)
        return
    width = shutil.get_terminal_size().columns - 1
    line = f"\r{text[:width]:{width}}"
    if not text:
        line += "\r"
    print(line, end="", flush=True)


def reporter(what: str) -> Callable[[int, int], None]:
    """A report(done, total) that shows how far `what` is, and how long it will still take."""
    start = time.monotonic()

    def report(done: int, total: int) -> None:
        rate = done / max(time.monotonic() - start, 1e-9)
        left = (total - done) / rate
        progress(f"{what}: {done:,} of {total:,}, {rate:,.0f} a second, {left / 60:.0f} min left")

    return report


def watched(batches: Iterable[torch.Tensor], what: str) -> Iterator[torch.Tensor]:
    """The batches as they are, with progress."""
    for number, batch in enumerate(batches, start=1):
        progress(f"{what}, batch {number}")
        yield batch


def print_setup(
    folder: Path,
    model: nn.Module,
    train: Images,
    test: Images,
    args: Namespace,
    device: torch.device,
) -> None:
    """What a run is about to do: where, on which pictures, which stages learn, on what device."""
    print(folder)
    print_data(train, test)
    print_stages(model, args.rates, args.frozen_batchnorm == "train")
    no_cuda = ""
    if args.device == "auto" and device.type != "cuda":
        no_cuda = ", no CUDA GPU"
    print(f"device   {device_name(device)}, {args.precision}{no_cuda}", flush=True)


def print_data(train: Images, test: Images) -> None:
    """How many images, of which classes, and how unequal these are."""
    counts = torch.bincount(train.labels, minlength=len(train.classes))
    small, large = counts.argmin(), counts.argmax()
    print(f"data     {len(train.labels):,} train and {len(test.labels):,} test images")
    named = ", ".join(train.classes[:10])
    if len(train.classes) > 10:
        named += f" and {len(train.classes) - 10} more"
    text = f"{len(train.classes)} classes: {named}"
    if counts[small] < counts[large]:
        text += f"; from {counts[small]:,} of {train.classes[small]} to {counts[large]:,} of "
        text += train.classes[large]
    for line in textwrap.wrap(text, 70):
        print(f"         {line}")


def print_stages(model: nn.Module, rates: dict[str, float], mistake: bool) -> None:
    """A line per stage: its parameters, and whether it learns."""
    print(f"{'stage':<8} {'parameters':>12}")
    for name, stage in freeze.stages(model).items():
        count = sum(parameter.numel() for parameter in stage.parameters())
        says = "frozen"
        if mistake:
            says = "frozen, BatchNorm in train mode"
        if name in rates:
            says = f"learns at {rates[name]:g}"
        print(f"{name:<8} {count:>12,}  {says}")


def print_header() -> None:
    print("    epoch  train loss  accuracy   test loss  accuracy   seconds", flush=True)


def print_epoch(row: dict, last: int) -> None:
    """A row of history.csv, under print_header's line; of many short epochs one in ten."""
    progress()
    epoch = row["epoch"]
    if last > MANY and row["seconds"] < SHORT and epoch not in (1, last) and epoch % 10:
        return
    print(
        f"{row['epoch']:4}/{last:<4} {row['train_loss']:11.4f} {row['train_accuracy']:9.2%} "
        f"{row['test_loss']:11.4f} {row['test_accuracy']:9.2%} {row['seconds']:9.1f}",
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
        print(
            "         quicker: a GPU, --train-size 5000, or --image-size 112, a quarter of the work"
        )


def print_row(row: dict, header: bool) -> None:
    """A row of summary.csv, for evaluate.py and compare.py."""
    if header:
        print("train loss  test loss   accuracy  images  epochs  run")
    print(
        f"{row['train_loss']:10.4f} {row['test_loss']:10.4f} {row['test_accuracy']:10.2%} "
        f"{row['test_images']:7,} {row['epochs']:7}  {row['run']}",
        flush=True,
    )
