"""The textbook script and this repository, side by side on the same work.

    python benchmark.py
    python benchmark.py --strategies layer4 --train-size 1000 --epochs 3
    python benchmark.py --dataset folder --data-dir pictures --csv speed.csv

Four variants train on the same images in the same order with the same flips,
each in a process of its own:

    textbook         what a tutorial teaches: PIL transforms in a DataLoader,
                     fp32, the whole network in every step (frozen right)
    textbook-tuned   what a good engineer adds: autocast, channels_last, pinned
                     memory, persistent workers, fused Adam, no waiting
    ours-nocache     train.py --cache off
    ours             train.py

Also takes train.py's --dataset, --data-dir, --weights, --image-size,
--batch-size, --seed, --device and --precision.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

import data
import freeze
import train
from machine import PRECISIONS, autocast, command, device_name, pick_device, pick_precision

STRATEGIES = {"fc": ["fc"], "layer4": ["layer4", "fc"], "layer3+layer4": ["layer3", "layer4", "fc"]}
VARIANTS = ("textbook", "textbook-tuned", "ours-nocache", "ours")
PASSED = ("dataset", "data_dir", "weights", "image_size", "batch_size", "seed", "device", "precision")
COLUMNS = ("strategy", "variant", "fill_seconds", "seconds_per_epoch", "eval_seconds", "images_per_second",
           "projected_10_epochs", "projected_50_epochs", "peak_host_bytes", "peak_device_bytes", "train_loss", "test_accuracy")


# ---------------------------------------------------------------- the textbook


class Pictures(datasets.ImageFolder):
    """Index i is picture i, and index i + len is its mirror image: order and flips come from outside."""

    def __init__(self, root: Path, image_size: int):
        super().__init__(str(root), transforms.Compose([
            transforms.Resize((image_size, image_size)), transforms.ToTensor(),
            transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)]))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = super().__getitem__(index % len(self))
        return image.flip(2) if index >= len(self) else image, label


def textbook(root: Path, unfrozen: list[str], epochs: int, args: Namespace, tuned: bool) -> dict:
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device) if tuned else "fp32"
    layout = torch.channels_last if tuned else torch.contiguous_format
    torch.backends.cudnn.benchmark = tuned
    train_set, test_set = Pictures(root / "train", args.image_size), Pictures(root / "test", args.image_size)
    options = {"num_workers": os.cpu_count(), "pin_memory": tuned and device.type == "cuda", "persistent_workers": tuned,
               "multiprocessing_context": multiprocessing.get_all_start_methods()[0]}  # the platform's default
    order = []  # filled anew in every epoch
    train_loader = DataLoader(train_set, args.batch_size, sampler=order, **options)
    test_loader = DataLoader(test_set, args.batch_size, **options)
    model = freeze.build(len(train_set.classes), freeze.load_weights(args.weights), args.seed).to(device, memory_format=layout)
    freeze.freeze(model, unfrozen)
    optimizer = torch.optim.Adam(freeze.param_groups(model, unfrozen), fused=tuned)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    train_seconds, eval_seconds = [], []
    for epoch in range(1, epochs + 1):
        start = time.monotonic()
        indices, flips = data.epoch_order(len(train_set), args.seed, epoch)
        order[:] = (indices + len(train_set) * flips[indices]).tolist()
        freeze.train_mode(model, unfrozen)
        loss_sum = 0.0
        for x, y in train_loader:
            x, y = x.to(device, memory_format=layout, non_blocking=tuned), y.to(device, non_blocking=tuned)
            optimizer.zero_grad()
            with autocast(device, precision):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            loss_sum += (loss.detach() if tuned else loss.item()) * len(y)
        train_loss = float(loss_sum) / len(train_set)
        train_seconds.append(time.monotonic() - start)
        start, correct = time.monotonic(), 0
        model.eval()
        with torch.no_grad():
            for x, y in test_loader:
                x, y = x.to(device, memory_format=layout, non_blocking=tuned), y.to(device, non_blocking=tuned)
                with autocast(device, precision):
                    right = (model(x).argmax(1) == y).sum()
                correct += right if tuned else right.item()
        accuracy = int(correct) / len(test_set)
        eval_seconds.append(time.monotonic() - start)
    return peaks(device) | {"fill_seconds": 0.0, "train_seconds": train_seconds, "eval_seconds": eval_seconds,
                            "train_loss": train_loss, "test_accuracy": accuracy}


# ---------------------------------------------------------------- this repository


def ours(root: Path, unfrozen: list[str], epochs: int, args: Namespace, cache: str) -> dict:
    flags = [word for name in PASSED for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    flags += ["--dataset", "folder", "--data-dir", str(root), "--cache", cache, "--out", str(root / "runs" / cache),
              "--unfreeze", *unfrozen, "--epochs", str(epochs)]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(flags)
    name = train.run_name(train.parse(flags)[1], unfrozen, epochs)
    saved = torch.load(root / "runs" / cache / name / "checkpoint.pt", weights_only=True)
    history = saved["history"]
    return peaks(pick_device(args.device)) | {
        "fill_seconds": saved["fill_seconds"] if cache != "off" else 0.0, "train_seconds": [row["train_seconds"] for row in history],
        "eval_seconds": [row["seconds"] - row["train_seconds"] for row in history],
        "train_loss": history[-1]["train_loss"], "test_accuracy": history[-1]["test_accuracy"]}


# ---------------------------------------------------------------- measuring


def peaks(device: torch.device) -> dict:
    """Peak memory of this process, without its workers, and of its tensors on a CUDA device, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage would tell the parent's peak if that was higher
        host = next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    else:
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_host_bytes": host, "peak_device_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0}


def in_a_process(function: Callable[..., dict], *arguments) -> dict:
    """What the function returns, and the wall time from the start of its interpreter to its end."""
    start = time.monotonic()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            result = pool.submit(function, *arguments).result()
        except BaseException:  # told to stop: the pool would wait for its end
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return result | {"wall_seconds": time.monotonic() - start}


def row(strategy: str, variant: str, result: dict, sizes: tuple[int, int], full: tuple[int, int]) -> dict:
    """A row of the table; sizes and full: images measured, images in the data set, (train, test)."""
    epoch, evaluation = statistics.median(result["train_seconds"]), statistics.median(result["eval_seconds"])
    start_up = result["wall_seconds"] - result["fill_seconds"] - sum(result["train_seconds"]) - sum(result["eval_seconds"])
    fill = result["fill_seconds"] * (2 * full[0] + full[1]) / (2 * sizes[0] + sizes[1])
    whole_epoch = epoch * full[0] / sizes[0] + evaluation * full[1] / sizes[1]
    values = (strategy, variant, result["fill_seconds"], epoch, evaluation, sizes[0] / epoch,
              start_up + fill + 10 * whole_epoch, start_up + fill + 50 * whole_epoch,
              result["peak_host_bytes"], result["peak_device_bytes"], result["train_loss"], result["test_accuracy"])
    return dict(zip(COLUMNS, values, strict=True))


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median of five calls, after one that does not count."""
    times = []
    for _ in range(6):
        start = time.monotonic()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - start)
    return statistics.median(times[1:])


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """What this machine can do: FLOP/s of a big square matrix product, bytes/s read and written by a copy."""
    side = 8192 if device.type == "cuda" else 3072
    matrix = torch.randn(side, side, device=device).to(dtype)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    return (2 * side**3 / seconds(lambda: matrix @ matrix, device),
            2 * len(block) / seconds(lambda: other.copy_(block), device))


def work(unfrozen: list[str], image_size: int) -> tuple[int, int, int]:
    """FLOPs of the tail's training step and of the prefix, counted layer by layer as they run, and
    how many numbers lie between them; per image."""
    model = freeze.build(10)
    freeze.freeze(model, unfrozen)
    prefix, tail = freeze.split(model, unfrozen)
    with FlopCounterMode(display=False) as prefix_flops:
        x = prefix(torch.zeros(2, 3, image_size, image_size))
    freeze.train_mode(model, unfrozen)
    with FlopCounterMode(display=False) as tail_flops:
        tail(x).sum().backward()
    return tail_flops.get_total_flops() // 2, prefix_flops.get_total_flops() // 2, x[0].numel()


# ---------------------------------------------------------------- the table


def show(rows: list[dict], epochs: int) -> None:
    first = rows[0]
    print(f"\n{'fc + ' if first['strategy'] != 'fc' else ''}{first['strategy'].replace('+', ' + ')}")
    print("variant          fill s  epoch s  images/s   ratio  10 epochs  50 epochs   ratio")
    for r in rows:
        print(f"{r['variant']:<15}" + (f"{r['fill_seconds']:8.2f}" if r["fill_seconds"] else f"{'-':>8}")
              + f" {r['seconds_per_epoch']:8.3f} {r['images_per_second']:9,.1f} "
              f"{r['images_per_second'] / first['images_per_second']:7.1f} {r['projected_10_epochs']:8,.0f} s "
              f"{r['projected_50_epochs']:8,.0f} s {first['projected_10_epochs'] / r['projected_10_epochs']:7.1f}")
    print(f"                 host GB   device GB   train loss   test accuracy (epoch {epochs})")
    for r in rows:
        print(f"{r['variant']:<15} {r['peak_host_bytes'] / 1e9:8.2f} {r['peak_device_bytes'] / 1e9:11.2f} "
              f"{r['train_loss']:12.4f} {r['test_accuracy']:15.2%}", flush=True)


def write_pictures(folder: Path, images: data.Images) -> None:
    """As PNG files in a folder per class, in an order that reading them keeps."""
    for label, name in enumerate(images.classes):
        (folder / name).mkdir(parents=True)
        for i in (images.labels == label).nonzero().flatten().tolist():
            Image.fromarray(images.pixels[i].numpy()).save(folder / name / f"{i:06}.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="default: all three")
    parser.add_argument("--epochs", type=train.whole_number(1), default=2, help="measured (default: 2)")
    parser.add_argument("--train-size", type=train.whole_number(1),
                        help="measured, with a quarter as many test images (default: all on a GPU, 256 on a CPU)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows to this file too")
    own, rest = parser.parse_known_args(argv)
    defaults, args = train.parse([])[1], train.parse(rest)[1]  # which refuses what it does not know
    for name in vars(args):
        if name not in PASSED and getattr(args, name) != getattr(defaults, name):
            parser.error(f"--{name.replace('_', '-')} is not for the benchmark, which compares the published settings")
    try:
        device = pick_device(args.device)
        freeze.load_weights(args.weights)
        images = data.load(args.dataset, "train", args.data_dir, args.image_size)
        test = data.load(args.dataset, "test", args.data_dir, args.image_size, images.classes)
        full = len(images.labels), len(test.labels)
        if size := own.train_size or (256 if device.type == "cpu" else None):
            images = data.stratified_subset(images, min(size, full[0]), args.seed)
            test = data.stratified_subset(test, min(max(size // 4, len(images.classes)), full[1]), args.seed)
        if own.csv:
            data.check_writable(own.csv)
    except (OSError, ValueError) as error:
        data.progress()
        parser.error(str(error))
    sizes = len(images.labels), len(test.labels)
    precision = pick_precision(args.precision, device)
    flop_rate, byte_rate = rates(device, PRECISIONS[precision])
    print(f"device   {device_name(device)}, torch {torch.__version__}, {precision} (textbook: fp32)")
    print(f"         {flop_rate / 1e9:,.0f} GFLOP/s in a matrix product, {byte_rate / 1e9:,.1f} GB/s in a copy")
    print(f"data     {args.dataset}: {sizes[0]:,} of {full[0]:,} train and {sizes[1]:,} of {full[1]:,} test images, "
          f"{own.epochs} epochs")
    print("         10 and 50 epochs: projected to all images, with start, fill and tests")
    rows = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        root = Path(folder)
        write_pictures(root / "train", images)
        write_pictures(root / "test", test)
        for strategy in own.strategies:
            unfrozen = STRATEGIES[strategy]
            shared = root, unfrozen, own.epochs, args
            for variant in VARIANTS:
                data.progress(f"{strategy}: {variant}")
                result = (in_a_process(textbook, *shared, variant == "textbook-tuned") if variant.startswith("textbook")
                          else in_a_process(ours, *shared, "off" if variant == "ours-nocache" else "auto"))
                rows.append(row(strategy, variant, result, sizes, full))
            data.progress()
            show(rows[-len(VARIANTS):], own.epochs)
            step, prefix, numbers = work(unfrozen, args.image_size)
            one = numbers * PRECISIONS[precision].itemsize
            floor = max(step / flop_rate, one / byte_rate)
            filled = (2 * sizes[0] + sizes[1]) / rows[-1]["fill_seconds"] if rows[-1]["fill_seconds"] else 0
            print(f"step     {step / 1e6:,.2f} MFLOP and {one / 1e6:.2f} MB an image: {1 / floor:,.0f} images/s at the rates above\n"
                  f"         {rows[-1]['images_per_second']:,.0f} images/s reached, {rows[-1]['images_per_second'] * floor:.0%}\n"
                  f"fill     {prefix / 1e6:,.2f} MFLOP an image: {flop_rate / prefix:,.0f} images/s at the rate above\n"
                  f"         {filled:,.0f} images/s reached, {filled / rows[-4]['images_per_second']:.1f} times the textbook's training", flush=True)
    if {"layer4", "layer3+layer4"} <= set(own.strategies):
        four = [r for r in rows if r["strategy"] != "fc"]
        textbook_seconds = sum(r["projected_10_epochs"] + r["projected_50_epochs"] for r in four if r["variant"] == "textbook")
        our_seconds = sum(r["projected_50_epochs"] for r in four if r["variant"] == "ours")  # which leave the ten on their way
        print(f"\nthe four runs of run_all.sh: {textbook_seconds:,.0f} s the textbook's way, {our_seconds:,.0f} s here, "
              f"{textbook_seconds / our_seconds:.1f} times as fast")
    if own.csv:
        data.write_csv(own.csv, COLUMNS, [r.values() for r in rows])
        print(f"\nsaved    {own.csv}")


if __name__ == "__main__":
    command(main, when_stopped="the CSV is written when all is measured, not before", when_full="lower --batch-size or --train-size")
