"""CIFAR as uint8 tensors in memory, and the transforms as batched tensor code.

    train = cifar("data", train=True)
    order, flips = epoch_order(len(train.labels), seed=0, epoch=1)
    some = order[:128]
    x = transform(train.pixels[some], 224, flips=flips[some])   # what the network sees
    y = train.labels[some]

    x = transform(read_picture("cat.jpg", (32, 32)), 224)       # a picture of your own

Imports torch, torchvision, numpy and PIL, nothing of this repository: copy it into yours.
"""

import contextlib
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin

# Of RGB in [0, 1]: what torchvision's ImageNet weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Text in a PNG that unpacks to more than 1 MB, such as an image generator's workflow, would make
# Pillow refuse the picture.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28


class UserError(Exception):
    """Something the user can put right; its text is a whole sentence that says how."""


class Images(NamedTuple):
    """One split of a data set."""

    pixels: torch.Tensor  # uint8 [N, H, W, 3], RGB
    labels: torch.Tensor  # int64 [N], positions in `classes`
    classes: tuple[str, ...]


def cifar(
    root: str | Path, name: str = "cifar10", train: bool = True, download: bool = True
) -> Images:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009), uint8 [50000 or 10000, 32, 32, 3]; torchvision
    downloads it if it is not in `root`, checks and unpacks it."""
    warnings.filterwarnings("ignore", message=".*align should be passed")  # how CIFAR was pickled
    from torchvision import datasets  # here: to import it takes as long as torch itself

    kinds = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
    found = kinds[name](root, train=train, download=download)
    pixels = torch.from_numpy(np.ascontiguousarray(found.data))
    return Images(pixels, torch.tensor(found.targets), tuple(found.classes))


def transform(
    pixels: torch.Tensor,
    image_size: int,
    dtype: torch.dtype = torch.float32,
    flips: torch.Tensor | None = None,
) -> torch.Tensor:
    """Flip, resize and normalize a batch, on whatever device it lies.

    pixels: uint8 [B, H, W, 3]; flips: bool [B], which images to mirror left to right.
    Returns `dtype` [B, 3, image_size, image_size] in channels_last memory, ImageNet-normalized,
    about -2.1 to 2.6. From 32x32 to 224x224 equal to Resize, ToTensor and Normalize of PIL images
    to rounding. For sizes that are no multiples some values are a level of 256 off, seldom two:
    from 50x40 to 32x32 a quarter of them (Pillow 13).

    It must give the same for the same picture and flip, since that is computed once and kept. What
    is random, such as a crop, belongs into train.py's AUGMENT."""
    if flips is not None:  # on the small image: mirroring commutes with resizing
        pixels = torch.where(flips.view(-1, 1, 1, 1), pixels.flip(2), pixels)
    images = pixels.permute(0, 3, 1, 2)
    if pixels.device.type == "cpu":  # has a uint8 kernel that works as PIL does
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    else:  # PIL resizes the width, rounds halves up, then does the same for the height
        for size in ((pixels.shape[1], image_size), (image_size, image_size)):
            images = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
            images = (images + 0.5).floor()
    # Subtracting a fixed mean and dividing by a fixed deviation is batch norm in eval mode: one
    # pass over the images in their final type, where ToTensor and Normalize make three in float32.
    mean, variance = mean_and_variance(pixels.device)
    images = images.to(dtype, memory_format=torch.channels_last)
    # torch 2.11 takes no epsilon of 0; this one is lost in rounding.
    return F.batch_norm(images, mean, variance, eps=1e-12)


@functools.cache
def mean_and_variance(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ImageNet's, of values from 0 to 255, float32 [3]; sent once, since a GPU waits for a copy."""
    mean = torch.tensor(IMAGENET_MEAN, device=device) * 255
    return mean, (torch.tensor(IMAGENET_STD, device=device) * 255) ** 2


def epoch_order(count: int, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of `count` images in an epoch, int64 [count], and which of them are mirrored,
    bool [count] by image. A function of (seed, epoch) alone, so no run needs to save RNG state."""
    generator = np.random.default_rng([seed, epoch])
    order = torch.from_numpy(generator.permutation(count))
    return order, torch.from_numpy(generator.random(count) < 0.5)


def epoch_generator(seed: int, epoch: int, device: torch.device | str) -> torch.Generator:
    """Where an epoch's augmentation draws its numbers: a function of (seed, epoch) and device."""
    state = np.random.SeedSequence([seed, epoch, 1]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> 1))


def random_crop(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An AUGMENT: each image moved by up to an eighth of its height (4 pixels for CIFAR) in both
    directions, with black where it leaves. uint8 [B, H, W, 3] to the same, any device."""
    count, height, width, _ = pixels.shape
    border = height // 8
    padded = F.pad(pixels, (0, 0, border, border, border, border))
    where = {"generator": generator, "device": pixels.device}
    top, left = torch.randint(2 * border + 1, (2, count, 1), **where)
    rows = (top + torch.arange(height, device=pixels.device))[:, :, None]
    columns = (left + torch.arange(width, device=pixels.device))[:, None, :]
    image = torch.arange(count, device=pixels.device)[:, None, None]
    return padded[image, rows, columns]


def random_erase(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An AUGMENT: a grey square over each image, of half its height (DeVries and Taylor 2017,
    arXiv:1708.04552), partly outside it at times. uint8 [B, H, W, 3] to the same, any device."""
    count, height, width, _ = pixels.shape
    where = {"generator": generator, "device": pixels.device}
    y, x = torch.rand(2, count, 1, **where)
    rows = (torch.arange(height, device=pixels.device) - y * height).abs() < height / 4
    columns = (torch.arange(width, device=pixels.device) - x * width).abs() < height / 4
    erased = rows[:, :, None, None] & columns[:, None, :, None]
    return torch.where(erased, pixels.new_tensor(127), pixels)


def read_picture(file: str | Path, size: Sequence[int] | None = None) -> torch.Tensor:
    """A picture file as a batch of one: uint8 [1, height, width, 3], RGB. size: (height, width) to
    resize to, as torchvision's Resize does. Raises UserError naming the file."""
    image, _ = open_picture(file)
    if size:
        height, width = size
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image))[None]


def open_picture(file: str | Path) -> tuple[Image.Image, bool]:
    """A picture file in RGB, upright as its EXIF orientation says; and whether it was transparent,
    and stands on white now. Raises UserError naming a file that cannot be read."""
    try:
        with Image.open(file) as image:
            with contextlib.suppress(Exception):  # broken metadata makes no broken picture
                image.getexif()  # read before it is dropped: exif_transpose would write it anew,
                image.info.pop("exif", None)  # and fail where a camera wrote invalid entries
                image = ImageOps.exif_transpose(image)
            return as_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly everything on a broken file
        raise UserError(f"cannot read the picture {file}: {error}") from error


def as_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """See open_picture. Raises ValueError for values whose white is not known."""
    if image.mode[0] in "IF":  # one channel of 16 or 32 bits
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if image.mode == "F" or low < 0 or high > 65535:
            found = f"values from {low:g} to {high:g} in 32 bits"
            raise ValueError(f"it holds {found}: save it with 8 bits, 0 to 255")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = False
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        transparent = image.getextrema()[3][0] < 255
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB"), transparent


def stratified_subset(images: Images, size: int, seed: int) -> Images:
    """`size` of the images, each class in its share to within an image or two and never without
    one; smaller subsets of one seed lie inside larger ones. Raises UserError if size is not
    within [classes, images]."""
    classes, count = len(images.classes), len(images.labels)
    if not classes <= size <= count:
        bounds = f"from {classes} (one image per class) to {count} (all there are)"
        raise UserError(f"the train size must be {bounds}, not {size}")
    generator = np.random.default_rng(seed)
    labels = images.labels.numpy()
    quantile = np.empty(count)  # of an image within its own class, after a shuffle
    for label in range(classes):
        rows = np.flatnonzero(labels == label)
        rank = generator.permutation(len(rows))
        spread = (rank + generator.random(len(rows))) / max(len(rows), 1)
        quantile[rows] = np.where(rank == 0, 0, spread)
    chosen = torch.from_numpy(np.sort(np.argsort(quantile)[:size]))
    return Images(images.pixels[chosen], images.labels[chosen], images.classes)
