"""CIFAR as uint8 tensors in memory, and the transforms as batched tensor code.

    train = cifar("data", train=True)
    order, flips = epoch_order(len(train.labels), seed=0, epoch=1)
    some = order[:128]
    x = transform(train.pixels[some], 224, flips=flips[some])   # what the network sees
    y = train.labels[some]

Imports torch, torchvision and numpy, nothing of this repository: copy it into yours.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torchvision import datasets

# Of RGB in [0, 1]: what torchvision's ImageNet weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}  # Krizhevsky 2009


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
    """CIFAR-10 or CIFAR-100, uint8 [50000 or 10000, 32, 32, 3]; checked and unpacked by
    torchvision, and downloaded by it if it is not in `root`."""
    warnings.filterwarnings("ignore", message=".*align should be passed")  # how CIFAR was pickled
    found = CIFAR[name](root, train=train, download=download)
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
    to floating-point rounding; for sizes that are no multiples some values round to the next of
    their 256 levels.
    """
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
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device) * 255
    variance = (torch.tensor(IMAGENET_STD, device=pixels.device) * 255) ** 2
    images = images.to(dtype, memory_format=torch.channels_last)
    return F.batch_norm(images, mean, variance, eps=1e-12)  # lost in rounding; 2.11 takes no 0


def epoch_order(count: int, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of `count` images in an epoch, int64 [count], and which of them are mirrored,
    bool [count] by image. A function of (seed, epoch) alone, so no run needs to save RNG state."""
    generator = np.random.default_rng([seed, epoch])
    order = torch.from_numpy(generator.permutation(count))
    return order, torch.from_numpy(generator.random(count) < 0.5)


def stratified_subset(images: Images, size: int, seed: int) -> Images:
    """`size` of the images, each class in its share to within an image or two and never without
    one; smaller subsets of one seed lie inside larger ones. Raises UserError if size is not
    within [classes, images]."""
    classes, count = len(images.classes), len(images.labels)
    if not classes <= size <= count:
        raise UserError(
            f"the train size must be from {classes} (one image per class) to {count} "
            f"(all there are), not {size}"
        )
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
