"""The textbook script and this repository, side by side on the same work.

    python -m study.benchmark
    python -m study.benchmark --strategies fc+layer4 --train-size 1000 --epochs 3
    python -m study.benchmark --dataset folder --data-dir pictures --csv speed.csv

Four variants train on the same images in the same order with the same flips,
each in a process of its own:

    textbook         what a tutorial teaches: PIL transforms in a DataLoader,
                     fp32, the whole network in every step (frozen right)
    textbook-tuned   what a good engineer adds: autocast, channels_last, pinned
                     memory, persistent workers, fused Adam, no waiting
    ours-nocache     train.py --cache off
    ours             train.py

Also takes train.py's --dataset, --data-dir, --weights, --model, --image-size,
--batch-size, --seed, --device and --precision.
"""

import plumbing  # noqa: F401  # before torch, for whose threads it sets something

# isort: split
import contextlib
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
import freeze
import train
from data import UserError
from plumbing import datasets, flags, machine, weights
from plumbing.cli import Parser, command, show_line, whole_number, wipe_line
from plumbing.files import check_writable, write_csv
from plumbing.run import CHECKPOINT_INTERVAL
from plumbing.weights import read_checkpoint
from study import textbook

STRATEGIES = ("fc", "fc+layer4", "fc+layer3+layer4")
VARIANTS = ("textbook", "textbook-tuned", "ours-nocache", "ours")
PASSED = ("dataset", "data_dir", "weights", "model", "image_size")
PASSED += ("batch_size", "seed", "device", "precision")


# ---------------------------------------------------------------- the four variants


def run_textbook(root: Path, strategy: str, args: Namespace, tuned: bool) -> dict:
    device = machine.pick_device(args.device)
    precision = "fp32"
    if tuned:
        precision = machine.pick_precision(args.precision, device)
    torch.backends.cudnn.benchmark = tuned
    amp = None
    if precision != "fp32":
        amp = machine.PRECISIONS[precision]
    count = sum(1 for _ in (root / "train").glob("*/*.png"))
    classes = len(list((root / "train").iterdir()))
    model = weights.pretrained(args, tuple(range(classes)))
    if not tuned:
        model = model.to(memory_format=torch.contiguous_format)
    rates = {stage: freeze.LEARNING_RATES[stage] for stage in strategy.split("+")}
    epochs = [data.epoch_order(count, args.seed, 1 + i) for i in range(args.measured)]
    rows = textbook.train(
        model.to(device), rates, root, epochs, args.image_size, args.batch_size, amp, tuned
    )
    return figures(rows, 0.0, device)


def run_ours(root: Path, strategy: str, args: Namespace, cache: str) -> dict:
    out = root / "runs" / cache
    words = ["--dataset", "folder", "--data-dir", root, "--cache", cache, "--out", out]
    words += ["--unfreeze", *strategy.split("+"), "--epochs", args.measured]
    for name in PASSED[2:]:
        words += [f"--{name.replace('_', '-')}", getattr(args, name)]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([str(word) for word in words])
    file = max(out.glob(f"*-{strategy}-*/epoch{args.measured}.pt"), key=os.path.getmtime)
    saved = read_checkpoint(file)
    fill = saved["metadata"]["fill_seconds"]
    if cache == "off":
        fill = 0.0
    result = figures(saved["history"], fill, machine.pick_device(args.device))
    start = time.monotonic()
    for split in ("train", "test"):
        datasets.load("folder", split, root, args.image_size)
    read = time.monotonic()
    torch.save(saved, root / "checkpoint.pt")
    result["write_seconds"] = time.monotonic() - read
    return result | {"read_seconds": read - start}


def figures(history: list[dict], fill_seconds: float, device: torch.device) -> dict:
    """What a variant gives: medians over its epochs, its last losses, its peak of memory."""
    tests = [row["seconds"] - row["train_seconds"] for row in history]
    device_bytes = 0
    if device.type == "cuda":
        device_bytes = torch.cuda.max_memory_allocated(device)
    return {
        "fill_seconds": fill_seconds,
        "seconds_per_epoch": statistics.median(row["train_seconds"] for row in history),
        "eval_seconds": statistics.median(tests),
        "measured_seconds": fill_seconds + sum(row["seconds"] for row in history),
        "train_loss": history[-1]["train_loss"],
        "test_accuracy": history[-1]["test_accuracy"],
        "peak_host_bytes": machine.peak_host_bytes(),
        "peak_device_bytes": device_bytes,
    }


def in_a_process(function: Callable[..., dict], *arguments) -> dict:
    """What the function returns, and the wall time from its interpreter's start to its end."""
    start = time.monotonic()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            result = pool.submit(function, *arguments).result()
        except BaseException:  # told to stop: the pool would wait for its end
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return result | {"wall_seconds": time.monotonic() - start}


def row_of(strategy: str, variant: str, result: dict, sizes: tuple, full: tuple) -> dict:
    """A row of the table, projected to all images, with reading them and writing checkpoints
    (which the textbook script does not, and its reading is part of its epochs). sizes and full:
    images measured, images in the data set, (train, test)."""
    result = dict(result)
    reading, writing = result.pop("read_seconds", 0), result.pop("write_seconds", 0)
    start_up = result.pop("wall_seconds") - result.pop("measured_seconds") - 2 * reading - writing
    start_up += reading * sum(full) / sum(sizes)
    fill = result["fill_seconds"] * (2 * full[0] + full[1]) / (2 * sizes[0] + sizes[1])
    epoch = result["seconds_per_epoch"] * full[0] / sizes[0]
    epoch += result["eval_seconds"] * full[1] / sizes[1]
    row = {"strategy": strategy, "variant": variant} | result
    row["images_per_second"] = sizes[0] / result["seconds_per_epoch"]
    epoch += min(
        writing, epoch / CHECKPOINT_INTERVAL
    )  # a checkpoint, where epochs are long in every one
    for epochs in (10, 50):
        row[f"projected_{epochs}_epochs"] = start_up + fill + epochs * epoch
    return row


# ---------------------------------------------------------------- what the machine can do


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median of five calls, after one that does not count."""
    times = []
    for _ in range(6):
        start = time.monotonic()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.monotonic() - start)
    return statistics.median(times[1:])


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a big square matrix product, bytes/s read and written by a copy."""
    side = 8192 if device.type == "cuda" else 3072
    matrix = torch.randn(side, side, device=device).to(dtype)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    products = 2 * side**3 / seconds(lambda: matrix @ matrix, device)
    return products, 2 * len(block) / seconds(lambda: other.copy_(block), device)


def work(strategy: str, image_size: int, model: str = "resnet18") -> tuple[int, int, int]:
    """FLOPs of the tail's training step and of the prefix, counted layer by layer as they run,
    and how many numbers lie between them; per image."""
    network = freeze.build(model, 10)
    learns = [stage for stage in freeze.stage_names(model) if stage in strategy.split("+")]
    freeze.freeze(network, learns)
    prefix, tail = freeze.split(network, learns[0])
    with FlopCounterMode(display=False) as prefix_flops:
        x = prefix(torch.zeros(2, 3, image_size, image_size))
    freeze.train_mode(network)
    with FlopCounterMode(display=False) as tail_flops:
        tail(x).sum().backward()
    return tail_flops.get_total_flops() // 2, prefix_flops.get_total_flops() // 2, x[0].numel()


# ---------------------------------------------------------------- the table


def show(rows: list[dict], epochs: int) -> None:
    first = rows[0]
    print(f"\n{first['strategy']}")
    print("variant          fill s  epoch s  images/s   ratio  10 epochs  50 epochs   ratio")
    for row in rows:
        fill = f"{row['fill_seconds']:8.2f}" if row["fill_seconds"] else f"{'-':>8}"
        faster = row["images_per_second"] / first["images_per_second"]
        whole = first["projected_10_epochs"] / row["projected_10_epochs"]
        print(
            f"{row['variant']:<15}{fill} {row['seconds_per_epoch']:8.3f} "
            f"{row['images_per_second']:9,.1f} {faster:7.1f} {row['projected_10_epochs']:8,.0f} s "
            f"{row['projected_50_epochs']:8,.0f} s {whole:7.1f}"
        )
    print(f"                 host GB   device GB   train loss   test accuracy (epoch {epochs})")
    for row in rows:
        print(
            f"{row['variant']:<15} {row['peak_host_bytes'] / 1e9:8.2f} "
            f"{row['peak_device_bytes'] / 1e9:11.2f} {row['train_loss']:12.4f} "
            f"{row['test_accuracy']:15.2%}",
            flush=True,
        )


def show_floor(rows: list[dict], sizes: tuple, args: Namespace, speed: tuple) -> None:
    """How near the last of these rows comes to what the machine can do at best."""
    ours, first = rows[-1], rows[0]
    step, prefix, numbers = work(ours["strategy"], args.image_size, args.model)
    one = numbers * machine.PRECISIONS[args.precision].itemsize
    floor = max(step / speed[0], one / speed[1])
    reached = ours["images_per_second"]
    print(f"step     {step / 1e6:,.2f} MFLOP and {one / 1e6:.2f} MB an image:", end=" ")
    print(f"{1 / floor:,.0f} images/s at the rates above")
    print(f"         {reached:,.0f} images/s reached, {reached * floor:.0%}")
    print(f"fill     {prefix / 1e6:,.2f} MFLOP an image:", end=" ")
    print(f"{speed[0] / prefix:,.0f} images/s at the rate above")
    if ours["fill_seconds"]:
        filled = (2 * sizes[0] + sizes[1]) / ours["fill_seconds"]
        times = filled / first["images_per_second"]
        print(f"         {filled:,.0f} images/s reached, {times:.1f} times the textbook's training")


def show_four_runs(rows: list[dict]) -> None:
    """What run_all.sh costs, where both its strategies were measured."""
    four = [row for row in rows if row["strategy"] != "fc"]
    if len({row["strategy"] for row in four}) < 2:
        return
    usual = [row for row in four if row["variant"] == "textbook"]
    theirs = sum(row["projected_10_epochs"] + row["projected_50_epochs"] for row in usual)
    here = sum(row["projected_50_epochs"] for row in four if row["variant"] == "ours")
    print(
        f"\nthe four runs of run_all.sh: {theirs:,.0f} s the textbook's way, {here:,.0f} s here, "
        f"{theirs / here:.1f} times as fast"
    )


# ---------------------------------------------------------------- measuring


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES),
        help="default: all three")
    add("--epochs", type=whole_number(1), default=2, help="measured (default: 2)")
    add("--train-size", type=whole_number(1), metavar="N",
        help="measured, with a quarter as many test images (default: all on a GPU, 256 on a CPU)")
    add("--csv", type=Path, metavar="FILE", help="write the rows to this file too")
    # fmt: on
    own, rest = parser.parse_known_args(argv)
    defaults = flags.parse("", train.RECIPE, [])
    args = flags.parse(__doc__, train.RECIPE, rest)  # which refuses what it does not know
    for name, value in vars(args).items():
        if name not in PASSED and value != getattr(defaults, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is not for the benchmark: it compares the published settings")
    args.strategies, args.measured, args.csv = own.strategies, own.epochs, own.csv
    args.size = own.train_size
    return args


def load(args: Namespace, device: torch.device) -> tuple[data.Images, data.Images, tuple]:
    """The images to measure on, train and test, and how many the data set has of each."""
    images = datasets.load(args.dataset, "train", args.data_dir, args.image_size)
    test = datasets.load(args.dataset, "test", args.data_dir, args.image_size, images.classes)
    full = len(images.labels), len(test.labels)
    size = args.size or (256 if device.type == "cpu" else None)
    if size:
        fewer = min(max(size // 4, len(images.classes)), full[1])
        images = data.stratified_subset(images, min(size, full[0]), args.seed)
        test = data.stratified_subset(test, fewer, args.seed)
    return images, test, full


def write_pictures(folder: Path, images: data.Images) -> None:
    """As PNG files in a folder per class, in an order that reading them keeps."""
    for label, name in enumerate(images.classes):
        (folder / name).mkdir(parents=True)
        for i in (images.labels == label).nonzero().flatten().tolist():
            Image.fromarray(images.pixels[i].numpy()).save(folder / name / f"{i:06}.png")


def measure(variant: str, root: Path, strategy: str, args: Namespace) -> dict:
    show_line(f"{strategy}: {variant}")
    if variant.startswith("textbook"):
        return in_a_process(run_textbook, root, strategy, args, variant == "textbook-tuned")
    cache = "off" if variant == "ours-nocache" else "auto"
    return in_a_process(run_ours, root, strategy, args, cache)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.csv:
        check_writable(args.csv)
    device = machine.pick_device(args.device)
    args.precision = machine.pick_precision(args.precision, device)
    weights.load(args.weights, args.model)  # to be refused before anything is measured
    images, test, full = load(args, device)
    sizes = len(images.labels), len(test.labels)
    speed = rates(device, machine.PRECISIONS[args.precision])
    name = machine.device_name(device)
    print(f"device   {name}, torch {torch.__version__}, {args.precision} (textbook: fp32)")
    print(f"         {speed[0] / 1e9:,.0f} GFLOP/s in a matrix product,", end=" ")
    print(f"{speed[1] / 1e9:,.1f} GB/s in a copy")
    print(f"data     {args.dataset}: {sizes[0]:,} of {full[0]:,} train and", end=" ")
    print(f"{sizes[1]:,} of {full[1]:,} test images, {args.measured} epochs")
    print("         10 and 50 epochs: projected to all images, with start, fill and tests")
    rows = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        root = Path(folder)
        write_pictures(root / "train", images)
        write_pictures(root / "test", test)
        for strategy in args.strategies:
            for variant in VARIANTS:
                result = measure(variant, root, strategy, args)
                rows.append(row_of(strategy, variant, result, sizes, full))
                if args.csv:  # row by row: a benchmark that is stopped keeps what it has
                    write_csv(args.csv, rows[0], [row.values() for row in rows])
            wipe_line()
            show(rows[-len(VARIANTS) :], args.measured)
            show_floor(rows[-len(VARIANTS) :], sizes, args, speed)
    show_four_runs(rows)


if __name__ == "__main__":
    command(
        main,
        when_stopped="the CSV holds what was measured so far",
        when_full="lower --batch-size or --train-size",
    )
