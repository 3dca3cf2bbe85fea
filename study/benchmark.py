"""The textbook script and this repository, side by side on the same work.

    python -m study.benchmark
    python -m study.benchmark --strategies fc+layer4 --train-size 1000 --epochs 3
    python -m study.benchmark --dataset folder --data-dir pictures --csv speed.csv

Four variants train on the same images in the same order with the same flips:

    textbook         what a tutorial teaches: PIL transforms in a DataLoader,
                     fp32, the whole network in every step (frozen right)
    textbook-tuned   what a good engineer adds: autocast, channels_last, pinned
                     memory, persistent workers, fused Adam, no waiting
    ours-nocache     train.py --cache off
    ours             train.py

Also takes train.py's --dataset, --data-dir, --weights, --model, --image-size,
--batch-size, --seed, --device and --precision. Losses and memory are in the CSV.
"""

import plumbing  # isort: skip  # noqa: F401  # before torch, for whose threads it sets something
import contextlib
import io
import multiprocessing
import statistics
import tempfile
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from PIL import Image

import data
import freeze
import train
from data import UserError
from plumbing import datasets, flags, machine, weights
from plumbing.cli import Parser, command, show_line, whole_number, wipe_line
from plumbing.files import writable, write_rows
from plumbing.weights import read_checkpoint
from study import textbook

STRATEGIES = ("fc", "fc+layer4", "fc+layer3+layer4")
CACHE = {"ours-nocache": "off", "ours": "auto"}  # train.py's --cache
VARIANTS = ("textbook", "textbook-tuned", *CACHE)
PASSED = ("model", "weights", "image_size", "batch_size", "seed", "device", "precision")


def measure(variant: str, root: Path, strategy: str, args: Namespace) -> dict[str, float]:
    """Train in a new process on root/train and test on root/test. Returns columns of the CSV file,
    and the seconds that the process took, with Python's start."""
    show_line(f"{strategy}: {variant}")
    start = time.monotonic()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            result = pool.submit(figures, variant, root, strategy, args).result()
        except BaseException:  # after Ctrl-C the pool would wait for the end of the training
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return result | {"wall_seconds": time.monotonic() - start}


def figures(variant: str, root: Path, strategy: str, args: Namespace) -> dict[str, float]:
    """What a variant gives: medians over its epochs, its last losses, its peak of memory."""
    fill = reading = 0.0
    if variant in CACHE:
        history, fill = run_ours(root, strategy, args, CACHE[variant])
        start = time.monotonic()  # the textbook script reads in its epochs, ours before them
        for split in ("train", "test"):
            datasets.load("folder", split, root, args.image_size)
        reading = time.monotonic() - start
    else:
        history = run_textbook(root, strategy, args, variant == "textbook-tuned")
    tests = [row["seconds"] - row["train_seconds"] for row in history]
    return {
        "fill_seconds": fill,
        "seconds_per_epoch": statistics.median(row["train_seconds"] for row in history),
        "eval_seconds": statistics.median(tests),
        "train_loss": history[-1]["train_loss"],
        "test_accuracy": history[-1]["test_accuracy"],
        "peak_host_bytes": machine.peak_host_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated(args.device),  # 0 on a CPU
        "measured_seconds": fill + sum(row["seconds"] for row in history),
        "read_seconds": reading,
    }


def run_textbook(root: Path, strategy: str, args: Namespace, tuned: bool) -> list[dict]:
    amp = None
    if tuned and args.precision != "fp32":
        amp = machine.PRECISIONS[args.precision]
    torch.backends.cudnn.benchmark = tuned
    pictures = textbook.Pictures(root / "train", args.image_size)
    model = weights.pretrained(args, tuple(pictures.classes)).to(args.device)
    rates = {stage: freeze.LEARNING_RATES[stage] for stage in strategy.split("+")}
    epochs = [data.epoch_order(len(pictures), args.seed, 1 + i) for i in range(args.epochs)]
    recipe = args.image_size, args.batch_size, amp, tuned
    return textbook.train(model, rates, root, epochs, *recipe)


def run_ours(root: Path, strategy: str, args: Namespace, cache: str) -> tuple[list[dict], float]:
    """A run's history, and the seconds in which it filled the cache."""
    out = root / "runs" / strategy / cache
    words = ["--dataset", "folder", "--data-dir", root, "--cache", cache, "--out", out]
    words += ["--unfreeze", *strategy.split("+"), "--epochs", args.epochs]
    for name in PASSED:
        words += [f"--{name.replace('_', '-')}", getattr(args, name)]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([str(word) for word in words])
    (file,) = out.glob("*/epoch*.pt")
    saved = read_checkpoint(file)
    return saved["history"], saved["metadata"]["fill_seconds"]


def row_of(strategy: str, variant: str, result: dict, sizes: tuple, full: tuple) -> dict:
    """A row of the CSV file, projected from `sizes` to `full`, numbers of (train, test) images."""
    row = {"strategy": strategy, "variant": variant} | result
    reading = row.pop("read_seconds")  # which the process did twice
    start_up = row.pop("wall_seconds") - row.pop("measured_seconds") - 2 * reading
    start_up += reading * sum(full) / sum(sizes)
    fill = row["fill_seconds"] * (2 * full[0] + full[1]) / (2 * sizes[0] + sizes[1])
    epoch = row["seconds_per_epoch"] * full[0] / sizes[0]
    epoch += row["eval_seconds"] * full[1] / sizes[1]
    row["images_per_second"] = sizes[0] / row["seconds_per_epoch"]
    for epochs in (10, 50):
        row[f"projected_{epochs}_epochs"] = start_up + fill + epochs * epoch
    return row


def show(rows: list[dict]) -> None:
    """The variants of one strategy. The ratios, of images/s and of 10 epochs, are to the first."""
    first = rows[0]
    print(f"\n{first['strategy']}")
    print("variant          fill s  epoch s  images/s   ratio  10 epochs  50 epochs   ratio")
    for row in rows:
        faster = row["images_per_second"] / first["images_per_second"]
        whole = first["projected_10_epochs"] / row["projected_10_epochs"]
        print(
            f"{row['variant']:<15}{row['fill_seconds']:8.2f} {row['seconds_per_epoch']:8.3f} "
            f"{row['images_per_second']:9,.1f} {faster:7.1f} {row['projected_10_epochs']:8,.0f} s "
            f"{row['projected_50_epochs']:8,.0f} s {whole:7.1f}",
            flush=True,
        )


def show_four_runs(rows: list[dict]) -> None:
    """What run_all.sh costs: of train.py's runs, the one of 50 epochs leaves the one of 10."""
    usual = [row for row in rows if row["variant"] == "textbook" and row["strategy"] != "fc"]
    ours = [row for row in rows if row["variant"] == "ours" and row["strategy"] != "fc"]
    if len(usual) == 2:
        theirs = sum(row["projected_10_epochs"] + row["projected_50_epochs"] for row in usual)
        here = sum(row["projected_50_epochs"] for row in ours)
        print(f"\nthe four runs of run_all.sh: {theirs:,.0f} s the textbook's way,", end=" ")
        print(f"{here:,.0f} s here, {theirs / here:.1f} times as fast")


def parse(argv: list[str] | None) -> Namespace:
    """train.py's flags and ours. Raises UserError for one that would change what is compared."""
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES, help="default: all")
    add("--epochs", type=whole_number(1), default=2, help="measured (default: 2)")
    add("--train-size", type=whole_number(1), metavar="N",
        help="measured, with a quarter as many test images (default: all on a GPU, 256 on a CPU)")
    add("--csv", type=writable, metavar="FILE", help="write the rows to this file too")
    # fmt: on
    own, rest = parser.parse_known_args(argv)
    args, usual = flags.parse(__doc__, train.RECIPE, rest), flags.parse("", train.RECIPE, [])
    for name, value in vars(args).items():
        if name not in ("dataset", "data_dir", *PASSED) and value != getattr(usual, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is not for the benchmark: it compares the published settings")
    return Namespace(**vars(args) | vars(own))


def load(args: Namespace, device: torch.device) -> tuple[data.Images, data.Images, tuple]:
    """The images to measure on, train and test, and how many the data set has of each."""
    images = datasets.load(args.dataset, "train", args.data_dir, args.image_size)
    test = datasets.load(args.dataset, "test", args.data_dir, args.image_size, images.classes)
    full, size = (len(images.labels), len(test.labels)), args.train_size
    if not size and device.type == "cpu":
        size = 256
    if size:
        fewer = min(max(size // 4, len(images.classes)), full[1])
        images = data.stratified_subset(images, min(size, full[0]), args.seed)
        test = data.stratified_subset(test, fewer, args.seed)
    return images, test, full


def write_pictures(folder: Path, images: data.Images) -> None:
    """PNG files, in a folder per class."""
    for name in images.classes:
        (folder / name).mkdir(parents=True)
    for i, label in enumerate(images.labels.tolist()):
        image = Image.fromarray(images.pixels[i].numpy())
        image.save(folder / images.classes[label] / f"{i:06}.png")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = machine.pick_device(args.device)
    args.device = str(device)
    args.precision = machine.pick_precision(args.precision, device)
    weights.load(args.weights, args.model)  # a file that does not fit is refused before hours pass
    images, test, full = load(args, device)
    sizes, rows = (len(images.labels), len(test.labels)), []
    print(f"device   {machine.device_name(device)}, torch {torch.__version__}, {args.precision}")
    print(f"data     {args.dataset}: {sizes[0]:,} of {full[0]:,} train and", end=" ")
    print(f"{sizes[1]:,} of {full[1]:,} test images, {args.epochs} epochs")
    print("         10 and 50 epochs: projected to all images, without saving")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        root = Path(folder)
        write_pictures(root / "train", images)
        write_pictures(root / "test", test)
        for strategy in args.strategies:
            for variant in VARIANTS:
                result = measure(variant, root, strategy, args)
                rows.append(row_of(strategy, variant, result, sizes, full))
                if args.csv:  # row by row: a benchmark that is stopped keeps what it has
                    write_rows(args.csv, rows)
            wipe_line()
            show(rows[-len(VARIANTS) :])
    show_four_runs(rows)


if __name__ == "__main__":
    csv_keeps = "the CSV holds what was measured so far"
    command(main, when_stopped=csv_keeps, when_full="lower --batch-size or --train-size")
