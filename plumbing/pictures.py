"""Folders of pictures as people have them: DIR/train/<class>/* and DIR/test/<class>/*.

    images = folder(Path("pictures"), "train", 224)

Which folders are splits, and which files are pictures, is decided here alone; data.py opens one.
What is left out, assumed or changed is said in a line.
"""

import contextlib
import functools
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import ExifTags, Image

from data import Images, UserError, open_picture, stratified_subset
from plumbing.cli import progress, wipe_line
from plumbing.machine import free_memory

# The usual names of each split's folder, in whatever case.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
ENDINGS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
ENDINGS |= {".webp", ".avif", ".ppm", ".pgm", ".pbm", ".pnm"}  # what Pillow reads without extras
READ = " ".join(sorted(ENDINGS))
# What Jupyter, macOS, Windows and network drives leave, beside all that begins with a dot.
SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"}
SYSTEM |= {"system volume information", "#recycle", "@recycle"}
SMALL_BYTES = 20_000  # of a file that is not worth a thread's while
NAMED = 10  # of many pictures or folders, how many a message names
FLAT = 8  # levels of 256 between a picture's darkest and brightest value: nothing to be seen
DARK = 16  # levels of 256: 12 bits saved in a file of 16 stay below, and look black


def folder(
    root: Path,
    split: str,
    image_size: int,
    classes: tuple[str, ...] | None = None,
    test_share: float | None = None,
    test_seed: int = 0,
    size: Sequence[int] | None = None,
) -> Images:
    """One split of the pictures in `root`: "train", "val" or "test". Raises UserError.

    classes: the training set's, to number the labels by. test_share: take this share of each class
    for the test, drawn by test_seed. size: (height, width) to resize to, as torchvision's Resize
    does to PIL images; without it [image_size, image_size], unless all are one size and smaller.
    """
    path = split_folder(root, split, test_share)
    names, files = pictures_in(path, may_lack=split != "train" and not test_share)
    classes = classes or names
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(f"{path} has classes the training set lacks: {', '.join(unknown)}")
    labels = torch.tensor([classes.index(composed(file.parent.name)) for file in files])
    if test_share:
        drawn, rest = draw_share(labels, classes, test_share, test_seed, "--test-share")
        rows = rest if split == "train" else drawn
        labels, files = labels[rows], [files[i] for i in rows]
    pixels = torch.from_numpy(decode(files, size or size_in_memory(files, image_size)))
    if 0 < pixels.max() < DARK:
        looks = f"nearly black, none above {pixels.max()} of 255"
        raise UserError(f"the pictures in {path} are {looks}: save them with 8 bits, 0 to 255")
    if (pixels.flatten(1).amax(1) - pixels.flatten(1).amin(1)).le(FLAT).all():
        print(f"warning: every picture in {path} is one flat colour, or nearly", flush=True)
    return Images(pixels, labels, classes)


def split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split that there is. val/ is for the test where test/ is missing, or has
    no classes, as Kaggle hands it out. Raises UserError."""
    there = {path.name.lower(): path for path in folders_in(root)}
    found = {}
    for split, usual in SPLITS.items():
        if names := [name for name in usual if name in there]:
            found[split] = there[names[0]]
    heap = found.get("test")
    if "val" in found and not (heap and folders_in(heap)):
        if heap:
            say_once(f"{heap} has no classes: evaluate.py --image {heap} names what is in it")
        found["test"] = found.pop("val")
    return found


def split_folder(root: Path, split: str, test_share: float | None = None) -> Path:
    """Where a split's classes are: one folder for both with test_share. Raises UserError."""
    found = split_folders(root)
    if test_share:
        if "test" in found:
            raise UserError(f"--test-share: the test pictures are in {found['test']} already")
        return found.get("train", root)
    if split not in found:
        there = ", ".join(path.name for path in folders_in(root)[:NAMED]) or "no folders"
        usual = SPLITS[split]
        if split == "test":
            usual += SPLITS["val"]
        reads = "--dataset folder reads DIR/train/<class>/* and DIR/test/<class>/*"
        share = "--test-share 0.2 takes a fifth of DIR/<class>/* or DIR/train/<class>/*"
        raise UserError(
            f"no {root}/{' or '.join(usual)}, only {there}: {reads}, with --data-dir DIR; {share}"
        )
    if split != "train":
        say_once(f"{split} pictures from {found[split]}")
    return found[split]


def draw_share(
    labels: torch.Tensor, classes: tuple[str, ...], share: float, seed: int, flag: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers, int64, of a share of each class, one image at least, and of the rest to train
    on. Raises UserError, which names `flag`, if that leaves no images of a class."""
    numbers = Images(torch.arange(len(labels)), labels, classes)
    size = max(round(share * len(labels)), len(classes))
    drawn = stratified_subset(numbers, size, seed).pixels
    rest = numbers.pixels[~torch.isin(numbers.pixels, drawn)]
    if lacking := set(classes) - {classes[i] for i in labels[rest]}:
        which = ", ".join(sorted(lacking)[:NAMED])
        raise UserError(f"{flag} {share:g} leaves no pictures to train on of {which}")
    say_once(f"{flag} {share:g}: {size:,} of {len(labels):,} pictures are drawn and not trained on")
    return drawn, rest


def pictures_in(path: Path, may_lack: bool) -> tuple[tuple[str, ...], list[Path]]:
    """The classes, sorted, and their pictures. may_lack: a class may be empty. Raises UserError,
    also for pictures that lie deeper: they may be a class of their own."""
    names = {composed(place.name) for place in folders_in(path)}
    if not names:
        raise UserError(f"{path} has no folder in it: it takes one for each class")
    found = find_pictures(path)
    loose = [file for file in found if file.parent == path]
    files = [file for file in found if file.parent.parent == path]
    if deeper := set(found) - {*loose, *files}:
        raise UserError(f"pictures lie deeper than {path}/<class>/: {min(deeper)}")
    if loose:
        say_once(f"left out of {path}: {len(loose)} pictures in no class")
    empty = sorted(names - {composed(file.parent.name) for file in files})
    if empty and not (may_lack and files):
        raise UserError(f"{path}: no pictures of {', '.join(empty)} (read: {READ})")
    return tuple(sorted(names)), files


def find_pictures(path: Path) -> list[Path]:
    """A file, or all pictures in a folder and below it, in the same order on every system. What is
    left out is counted by ending. Raises UserError."""
    if not path.is_dir():
        return [path]
    files, left_out = [], Counter()
    for where, folders, names in os.walk(path, onerror=cannot_read, followlinks=True):
        folders[:] = visible(folders, left_out)
        for name in visible(names, left_out):
            ending = Path(name).suffix.lower()
            if ending in ENDINGS:
                files.append(Path(where, name))
            else:
                left_out[ending or "without an ending"] += 1
    if told := [f"{count} {what}" for what, count in left_out.most_common() if count]:
        say_once(f"left out of {path}: {', '.join(told)}")
    if not files:
        raise UserError(f"{path} holds no pictures (read: {READ})")
    return files


def folders_in(root: Path) -> list[Path]:
    """The folders in a folder, sorted. Raises UserError if it cannot be read."""
    _, names, _ = next(os.walk(root, onerror=cannot_read))
    return [root / name for name in visible(names, Counter())]


def visible(names: list[str], left_out: Counter) -> list[str]:
    """The names without those of hidden and system files, which are counted; sorted."""
    kept = [name for name in names if not name.startswith(".") and name.lower() not in SYSTEM]
    left_out["hidden or system"] += len(names) - len(kept)
    return sorted(kept, key=composed)


def cannot_read(error: OSError) -> NoReturn:
    raise UserError(f"cannot read the folder {error.filename} ({error.strerror})") from error


def composed(name: str) -> str:
    """A name with its accents composed: macOS writes é as two characters, Linux as one."""
    return unicodedata.normalize("NFC", name)


@functools.cache
def say_once(text: str) -> None:
    wipe_line()
    print(text, flush=True)


def size_in_memory(files: list[Path], image_size: int) -> tuple[int, int]:
    """The (height, width) that all pictures share, if it is no larger than image_size; otherwise
    (image_size, image_size). Reads the files' headers alone."""
    shared = None
    for file in progress(files, "looking at pictures"):
        with contextlib.suppress(Exception), Image.open(file) as image:  # decode names broken ones
            width, height = image.size
            with contextlib.suppress(Exception):  # broken metadata makes no broken picture
                orientation = image.getexif().get(ExifTags.Base.Orientation)
                if orientation in range(5, 9) and image.format != "TIFF":  # Pillow turns that one
                    width, height = height, width
            if max(height, width) > image_size or shared not in (None, (height, width)):
                return image_size, image_size
            shared = height, width
    return shared or (image_size, image_size)


def decode(files: list[Path], size: Sequence[int]) -> np.ndarray:
    """All pictures, resized: uint8 [N, height, width, 3]. Raises UserError naming broken ones."""
    height, width = size
    need = len(files) * height * width * 3
    free = free_memory("host", torch.device("cpu"), Path())
    if free is not None and need > free:
        sizes = f"take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        less = "use a smaller --image-size or fewer pictures"
        raise UserError(f"{len(files):,} pictures of {width}x{height} {sizes}: {less}")
    pixels = np.empty((len(files), height, width, 3), np.uint8)

    def decode_one(i: int) -> str | None:
        """What is wrong with a picture, if it cannot be read."""
        try:
            image, transparent = open_picture(files[i])
        except UserError as error:
            return str(error)
        pixels[i] = image.resize((width, height), Image.Resampling.BILINEAR)
        if transparent:
            say_once("transparent pictures are put on white")

    # Pillow decodes outside the interpreter lock, so threads help with photographs. Small files are
    # read faster one by one: 11,000 of CIFAR's in 3.9 s in place of 5.9 (EPYC, 2 cores).
    some = [os.path.getsize(file) for file in files[:100] if os.path.isfile(file)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        each = pool.map if sum(some) > len(some) * SMALL_BYTES else map
        read = progress(each(decode_one, range(len(files))), "reading pictures", len(files))
        broken = [error for error in read if error]
    if broken:
        more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise UserError("; ".join(broken[:NAMED]) + more)
    return pixels
