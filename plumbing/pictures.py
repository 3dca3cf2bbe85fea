"""Folders of pictures as people have them: root/train/<class>/* and root/test/<class>/*."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import datasets

from data import Images, UserError
from plumbing.machine import memory_is_full
from plumbing.terminal import progress

BILINEAR = Image.Resampling.BILINEAR  # what torchvision resizes with unless told otherwise
DEEPEST = 20  # folders below a class; a symbolic link in a circle is followed 40 times


def folder(
    root: Path, split: str, image_size: int, classes: tuple[str, ...] | None = None
) -> Images:
    """Pictures laid out as root/train/<class>/* and root/test/<class>/* (or root/val/).

    Kept as they are when all are one size no larger than image_size, otherwise resized to
    [image_size, image_size], as torchvision's Resize does to PIL images. Raises UserError.
    """
    path = split_folder(root, split)
    try:
        found = datasets.ImageFolder(str(path))
    except FileNotFoundError as error:  # no class, or a class without a picture: it says which
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    classes = classes or tuple(found.classes)
    if unknown := sorted(set(found.classes) - set(classes)):
        raise UserError(f"{path} has classes the training set lacks: {', '.join(unknown)}")
    files = [file for file, _ in found.samples]
    deepest = max(files, key=lambda file: file.count(os.sep))
    if deepest.count(os.sep) > str(path).count(os.sep) + DEEPEST:
        raise UserError(f"a symbolic link leads round in a circle: {deepest}")
    position = [classes.index(name) for name in found.classes]
    labels = torch.tensor([position[label] for _, label in found.samples])
    return Images(torch.from_numpy(decode(files, image_size)), labels, classes)


def split_folder(root: Path, split: str) -> Path:
    """Where a split's classes are. Raises UserError."""
    wanted = [root / "train"]
    if split == "test":
        wanted = [root / "test", root / "val"]
    for path in wanted:
        if path.is_dir():
            return path
    raise UserError(
        f"no {' or '.join(map(str, wanted))}: --dataset folder reads DIR/train/<class>/* and "
        "DIR/test/<class>/* (or DIR/val), with --data-dir DIR"
    )


def read_image(file: str | Path) -> Image.Image:
    """A picture as RGB, upright as its EXIF orientation says. Raises UserError naming the file."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip to 8
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # PIL's plugins raise nearly everything on a broken file
        if memory_is_full(error):
            raise
        raise UserError(f"cannot read the picture {file}: {error}") from error


def decode(files: list[str], image_size: int) -> np.ndarray:
    """All pictures, uint8 [N, height, width, 3]: in their own size if they share one that is no
    larger than image_size, else resized to [image_size, image_size]."""
    size = read_image(files[0]).size
    if max(size) <= image_size:
        pixels = decode_as(files, size, resize=False)
        if pixels is not None:
            return pixels
    return decode_as(files, (image_size, image_size), resize=True)


def decode_as(files: list[str], size: tuple[int, int], resize: bool) -> np.ndarray | None:
    """Pictures of one (width, height), uint8 [N, height, width, 3]; if one has another size and
    is not to be resized, None."""
    pixels = np.empty((len(files), size[1], size[0], 3), np.uint8)

    def decode_one(i: int) -> bool:
        image = read_image(files[i])
        fits = resize or image.size == size
        if fits:
            pixels[i] = image.resize(size, BILINEAR)
        return fits

    # PIL decodes outside the interpreter lock; tiny pictures only fight for it
    with ThreadPoolExecutor() as pool:
        run = map if max(size) <= 64 else pool.map
        for done, fits in enumerate(run(decode_one, range(len(files))), start=1):
            if not fits:
                pool.shutdown(cancel_futures=True)
                return None
            progress(f"reading pictures: {done:,} of {len(files):,}")
    progress()
    return pixels
