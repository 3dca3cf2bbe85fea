"""Folders of pictures as people have them: DIR/train/<class>/* and DIR/test/<class>/*.

    images = folder(Path("pictures"), "train", 224)

Which folders are splits, and which files are pictures, is decided here alone; data.py opens one.
What is left out, assumed or changed is said in a line.
"""

import functools
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image, features

from data import Images, UserError, open_lazily, open_picture, stratified_subset
from plumbing.cli import progress, wipe_line
from plumbing.machine import free_memory

BILINEAR = Image.Resampling.BILINEAR  # what torchvision resizes with unless told otherwise
# The usual names of each split's folder, in whatever case.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
ENDINGS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
ENDINGS |= {".webp", ".ppm", ".pgm", ".pbm", ".pnm"}  # what Pillow reads without extras
if features.check("avif"):  # from Pillow 11.3 on
    ENDINGS.add(".avif")
READ = " ".join(sorted(ENDINGS))
# What Jupyter, macOS, Windows and network drives leave, beside all that begins with a dot.
SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"}
SYSTEM |= {"system volume information", "#recycle", "@recycle"}
NAMED = 10  # of many of a kind, how many are named
ORIENTATION, ON_ITS_SIDE = 0x0112, 5  # an EXIF tag, and the first of its values to mean that
FLAT = 8  # levels of 256 between a picture's darkest and brightest value: nothing to be seen
DARK = 4096  # of 65,536 levels: 12 bits in a file of 16, which look black


# ---------------------------------------------------------------- which folders


def folder(
    root: Path,
    split: str,
    image_size: int,
    classes: tuple[str, ...] | None = None,
    test_share: float | None = None,
    test_seed: int = 0,
    size: Sequence[int] | None = None,
) -> Images:
    """One split of the pictures in `root`: "train", "val" or "test". test_share: take this share of
    each class for the test, drawn by test_seed, where there is no test folder. size: (height,
    width) that the training pictures have in memory, for the others to have it too.

    Otherwise kept as they are when all are one size no larger than image_size, else resized to
    [image_size, image_size], as torchvision's Resize does to PIL images. Raises UserError.
    """
    path = split_folder(root, split, test_share)
    names, files = pictures_in(path, lacking_is_fine=split != "train" and not test_share)
    classes = classes or names
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(f"{path} has classes the training set lacks: {', '.join(unknown)}")
    labels = torch.tensor([classes.index(class_name(file.parent)) for file in files])
    chosen = torch.arange(len(files))
    if test_share:
        chosen = share(labels, names, split, test_share, test_seed)
        files = [files[i] for i in chosen]
    if not size:
        size = size_in_memory(files, image_size)
    pixels = torch.from_numpy(decode(files, size))
    if (pixels.flatten(1).amax(1) - pixels.flatten(1).amin(1)).le(FLAT).all():
        print(f"warning: every picture in {path} is one flat colour, or nearly", flush=True)
    return Images(pixels, labels[chosen], classes)


def split_folder(root: Path, split: str, test_share: float | None = None) -> Path:
    """Where a split's classes are: DIR/train, or any usual name of it. val/ is for the test where
    test/ is missing, or is a heap of pictures without classes. Raises UserError."""
    found = split_folders(root)
    if test_share:
        if path := found["test"] or found["val"]:
            raise UserError(f"--test-share: the test pictures are in {path} already")
        return found["train"] or root
    path = found[split]
    if split == "test" and found["val"] and not has_val(root):
        path = found["val"]
        if heap := found["test"]:
            say_once(f"{heap} has no classes: evaluate.py --image {heap} names what is in it")
    if path:
        if split != "train":
            say_once(f"{'validation' if split == 'val' else split} pictures from {path}")
        return path
    there = [path for path in entries(root) if path.is_dir() and not is_system(path)]
    usual = " or ".join(SPLITS[split] + SPLITS["val"] * (split == "test"))
    named = ", ".join(path.name for path in there[:NAMED]) or "no folders"
    raise UserError(
        f"no {root}/{usual}, only {named}: --dataset folder reads "
        "DIR/train/<class>/* and DIR/test/<class>/*, with --data-dir DIR; --test-share 0.2 "
        "takes a fifth of DIR/<class>/* or DIR/train/<class>/* for the test"
    )


def split_folders(root: Path) -> dict[str, Path | None]:
    """The folder of each split, if there is one."""
    there = [path for path in entries(root) if path.is_dir() and not is_system(path)]
    return {name: with_name(usual, there) for name, usual in SPLITS.items()}


def has_val(root: Path) -> bool:
    """Whether there are pictures to validate on beside those to test on, both by class."""
    found = split_folders(root)
    if not found["val"] or not found["test"]:
        return False
    return any(path.is_dir() and not is_system(path) for path in entries(found["test"]))


def with_name(names: tuple[str, ...], there: list[Path]) -> Path | None:
    """The folder with the first of these names, in whatever case."""
    for name in names:
        for path in there:
            if path.name.lower() == name:
                return path
    return None


def share(
    labels: torch.Tensor, classes: tuple[str, ...], split: str, test_share: float, seed: int
) -> torch.Tensor:
    """Which of the pictures are in a split, int64: a share of each class for the test, and the
    rest for training. seed: --test-seed's, so that runs of all seeds can be compared."""
    test, rest = draw_share(labels, classes, test_share, seed)
    if split == "test":
        print(
            f"test pictures: {len(test):,} of {len(labels):,}, the same share of each class, drawn"
        )
        return test
    if lacking := sorted(set(classes) - {classes[i] for i in labels[rest]}):
        which = ", ".join(lacking[:NAMED])
        raise UserError(f"--test-share {test_share:g} leaves no pictures to train on of {which}")
    return rest


def draw_share(
    labels: torch.Tensor, classes: tuple[str, ...], share: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which images are in a share of each class, one of each at least, and the others: int64."""
    numbers = Images(torch.arange(len(labels)), labels, classes)
    size = max(round(share * len(labels)), len(classes))
    chosen = stratified_subset(numbers, size, seed).pixels
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[chosen] = False
    return chosen, rest.nonzero().flatten()


def in_both(train: Images, test: Images) -> int:
    """How many of the test pictures are among the training pictures, pixel for pixel."""

    def digest(picture: torch.Tensor) -> bytes:
        return hashlib.blake2b(picture.numpy(), digest_size=16).digest()

    seen = set(map(digest, train.pixels))
    return sum(digest(picture) in seen for picture in test.pixels)


# ---------------------------------------------------------------- which files


def pictures_in(path: Path, lacking_is_fine: bool) -> tuple[tuple[str, ...], list[Path]]:
    """The classes, sorted, and the pictures of all of them, class by class. Says what is left
    out. lacking_is_fine: a class may be empty. Raises UserError."""
    names, files, left_out = set(), [], Counter()
    for place in entries(path):
        if is_system(place):
            left_out["hidden or system"] += 1
        elif not place.is_dir():
            left_out[f"{place.suffix or place.name} in no class"] += 1
        else:
            names.add(class_name(place))
            files += pictures_of(place, left_out)
    if not names:
        raise UserError(f"{path} has no folder in it: it takes one for each class")
    if not files:
        raise UserError(f"{path} holds no pictures (read: {READ})")
    empty = sorted(names - {class_name(file.parent) for file in files})
    if empty and not lacking_is_fine:
        raise UserError(f"{path}: no pictures of {', '.join(empty)} (read: {READ})")
    say_left_out(path, left_out)
    return tuple(sorted(names)), files


def pictures_of(place: Path, left_out: Counter) -> list[Path]:
    """The pictures of one class; counts the other files in left_out. Raises UserError for
    pictures that lie deeper, of which nobody knows whether they are another class."""
    files = []
    for file in entries(place):
        if is_system(file):
            left_out["hidden or system"] += 1
        elif file.is_dir():
            if inner := next(pictures_below(file), None):
                raise UserError(f"pictures lie deeper than {place.parent}/<class>/: {inner}")
            left_out["folder"] += 1
        elif file.suffix.lower() in ENDINGS:
            files.append(file)
        else:
            left_out[file.suffix.lower() or "without an ending"] += 1
    return files


def pictures_below(place: Path, left_out: Counter | None = None) -> Iterator[Path]:
    """The pictures in a folder and in all folders in it; counts the other files in left_out."""
    left_out = Counter() if left_out is None else left_out
    for where, folders, names in os.walk(place, onerror=cannot_read):
        folders[:] = sorted(name for name in folders if not is_system(Path(name)))
        for file in (Path(where) / name for name in sorted(names)):
            if is_system(file):
                left_out["hidden or system"] += 1
            elif file.suffix.lower() in ENDINGS:
                yield file
            else:
                left_out[file.suffix.lower() or "without an ending"] += 1


def find_pictures(path: Path) -> list[Path]:
    """A file, or all pictures in a folder and below it. Says what is left out. Raises UserError."""
    if not path.is_dir():
        return [path]
    left_out = Counter()
    files = list(pictures_below(path, left_out))
    say_left_out(path, left_out)
    if not files:
        raise UserError(f"{path} holds no pictures (read: {READ})")
    return files


def entries(root: Path) -> list[Path]:
    """What is in a folder, sorted. Raises UserError for one that is none or cannot be read."""
    try:
        return sorted(root.iterdir(), key=class_name)
    except OSError as error:
        cannot_read(error)


def cannot_read(error: OSError) -> NoReturn:
    raise UserError(f"cannot read the folder {error.filename} ({error.strerror})") from error


def class_name(place: Path) -> str:
    """A folder's name, its accents composed: macOS writes é as two characters, Linux as one."""
    return unicodedata.normalize("NFC", place.name)


def is_system(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in SYSTEM


def say_left_out(path: Path, left_out: Counter) -> None:
    if left_out:
        told = ", ".join(f"{count} {what}" for what, count in left_out.most_common(NAMED))
        say_once(f"left out of {path}: {told}")


@functools.cache
def say_once(text: str) -> None:
    wipe_line()
    print(text, flush=True)


# ---------------------------------------------------------------- reading them


def size_in_memory(files: list[Path], image_size: int) -> tuple[int, int]:
    """The (height, width) that all pictures share, if it is no larger than image_size; otherwise
    (image_size, image_size). Reads the files' headers alone."""
    shared = None
    for file in progress(files, "looking at pictures"):
        try:
            with open_lazily(file) as image:
                width, height = image.size
                if image.getexif().get(ORIENTATION, 1) >= ON_ITS_SIDE:
                    width, height = height, width
        except Exception:  # which decode will tell, of this file and of all others
            continue
        if max(height, width) > image_size or shared not in (None, (height, width)):
            return image_size, image_size
        shared = height, width
    return shared or (image_size, image_size)


def decode(files: list[Path], size: Sequence[int]) -> np.ndarray:
    """All pictures, resized to (height, width): uint8 [N, height, width, 3]. Raises UserError
    naming those that cannot be read."""
    height, width = size
    need = len(files) * height * width * 3
    free = free_memory("host", torch.device("cpu"), Path())
    if free is not None and need > free:
        raise UserError(
            f"{len(files):,} pictures of {width}x{height} take {need / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free: use a smaller --image-size or fewer pictures"
        )
    pixels, deep, broken = np.empty((len(files), height, width, 3), np.uint8), [], []

    def decode_one(i: int) -> None:
        try:
            picture = open_picture(files[i])
        except UserError as error:
            broken.append(str(error))
            return
        pixels[i] = picture.image.resize((width, height), BILINEAR)
        if picture.transparent:
            say_once("transparent pictures are put on white")
        if picture.highest:
            deep.append(picture.highest)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter lock
        for _ in progress(pool.map(decode_one, range(len(files))), "reading pictures", len(files)):
            pass
    if broken:
        more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise UserError("; ".join(sorted(broken)[:NAMED]) + more)
    if deep and max(deep) < DARK:
        raise UserError(
            f"the pictures of 16 bits in {files[0].parent.parent} are nearly black, none above "
            f"{max(deep):,} of 65,535: save them with 8 bits, or spread over all 16"
        )
    return pixels
