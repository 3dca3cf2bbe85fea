"""Where features are kept: on the device, on the host, in a file, or nowhere.

    inputs, seconds = keep({"train": inputs, "test": test}, "auto", device, folder, settings)

What does not fit in one place is split over several, and what fits nowhere is computed in every
epoch. A place that is too small in spite of the estimate is given up for the next one.
"""

import contextlib
import copy
import functools
import itertools
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from data import UserError
from features import Features
from plumbing.cli import DISK_IS_FULL, progress, wipe_line
from plumbing.machine import free_memory, memory_is_full
from plumbing.settings import Settings

PLACES = ("auto", "device", "host", "disk", "off")
WORDS = {"device": "in device memory", "host": "in host memory", "disk": "in a file"}
# Left for training beside the features, the larger of: so many bytes for a step of 128 pictures of
# 224x224, and so many times a batch's features, of both flips. Of these ResNet50 with layer3 takes
# 17 (counted, not measured).
FREE_BYTES, FREE_BATCHES = 2 * 2**30, 25
FREE_DISK_BYTES = 2**28  # left for checkpoints


def keep(
    inputs: dict[str, Features], wanted: str, device: torch.device, folder: Path, settings: Settings
) -> tuple[dict[str, "Features | SplitFeatures"], float]:
    """Compute these features once, keep them, and say where: training's first, test's last.
    wanted: one of PLACES; folder: for a file; settings: of the training, which needs memory too.
    Returns the features, now to be looked up, and the seconds that it took. Raises UserError when
    a place that was asked for cannot hold them all."""
    start, computed = time.monotonic(), 0
    # How many images of each are still to be kept. What no stage changes, or AUGMENT changes in
    # every epoch, is not kept.
    left = {name: len(some) for name, some in inputs.items() if some.prefix and not some.augment}
    pieces = {name: [] for name in inputs}
    # A GPU computes 128 features sooner than a disk reads them; a CPU does not.
    auto = ["device", "host"] if device.type == "cuda" else ["host", "disk"]
    for place in {"auto": auto, "off": []}.get(wanted, [wanted]):
        need = bytes_left(inputs, left)
        free, spare = free_memory(place, device, folder), spare_bytes(place, inputs, settings)
        room = need if free is None else max(free - spare, 0)
        if wanted != "auto" and need > room:
            asked = f"--cache {wanted}: {need / 1e9:.2f} GB of features"
            there = f"{spare / 1e9:.1f} GB to spare do not fit ({free / 1e9:.1f} GB free"
            instead = "try --cache auto, --train-size or a smaller --image-size"
            raise UserError(f"{asked} and {there} {WORDS[place]}); {instead}")
        parts = fill_place(place, inputs, left, room, device, folder)
        for name, part in parts.items():
            pieces[name].append(part)
            left[name] -= len(part)
            computed += part.shape[0]
        if parts:
            print_kept([*parts.values()], sum(map(len, inputs.values())), place, free)
    seconds = time.monotonic() - start
    if computed:
        print(f"         filled in {seconds:.1f} s, {computed / seconds:,.0f} images/s", flush=True)
    print_uncached(inputs, left, wanted)
    return {name: joined(features, pieces[name]) for name, features in inputs.items()}, seconds


def image_bytes(features: Features) -> int:
    return features.bytes // len(features)


def bytes_left(inputs: dict[str, Features], left: dict[str, int]) -> int:
    return sum(image_bytes(inputs[name]) * count for name, count in left.items())


def spare_bytes(place: str, inputs: dict[str, Features], settings: Settings) -> int:
    """What is to be left free. A step of larger pictures, batches or networks needs more."""
    if place == "disk":
        return FREE_DISK_BYTES
    step = settings.batch_size / 128 * (settings.image_size / 224) ** 2
    batch = settings.batch_size * max(map(image_bytes, inputs.values()))
    return max(FREE_BYTES, int(FREE_BYTES * step), FREE_BATCHES * batch)


def fill_place(
    place: str,
    inputs: dict[str, Features],
    left: dict[str, int],
    room: int,
    device: torch.device,
    folder: Path,
) -> dict[str, Features]:
    """The pieces of features that were kept: as many as fit into `room` bytes, or fewer if the
    place is too small in spite of the estimate. The last inputs go first: every epoch looks up all
    test features, but only one of two of a training picture."""
    parts = {}
    where = device if place == "device" else torch.device("cpu")
    show = functools.partial(progress, text="filling, batch")
    try:
        for name in reversed(left):
            count = min(left[name], room // image_bytes(inputs[name]))
            if count:
                part = piece(inputs[name], len(inputs[name]) - left[name], count)
                store = mapped_file(part, folder) if place == "disk" else None
                part.fill(where, show, store)
                parts[name] = part
                room -= part.bytes
    except (RuntimeError, MemoryError, OSError) as error:
        if not memory_is_full(error) and getattr(error, "errno", None) not in DISK_IS_FULL:
            raise
        wipe_line()
        print(f"         it does not fit {WORDS[place]} after all", flush=True)
    return parts


def mapped_file(features: Features, folder: Path) -> torch.Tensor:
    """An empty store in a file that is mapped into memory. Its name is deleted at once, so that it
    is gone when the process ends; on Windows the next run deletes it."""
    folder.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(".part", ".features.", folder)
    try:
        if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the process
            os.posix_fallocate(number, 0, features.bytes)
        count = features.bytes // features.dtype.itemsize
        store = torch.from_file(name, shared=True, size=count, dtype=features.dtype)
    finally:
        os.close(number)
        with contextlib.suppress(OSError):  # Windows keeps a file that is in use
            os.unlink(name)
    return store.view(features.shape)


def print_kept(parts: list[Features], images: int, place: str, free: int | None) -> None:
    size, count = sum(part.bytes for part in parts) / 1e9, sum(map(len, parts))
    some = "" if count == images else f" of {count:,} of {images:,} images"
    known = "how much is free is not known" if free is None else f"{free / 1e9:.1f} GB were free"
    print(f"cache    {size:.2f} GB of features{some} {WORDS[place]}, {known}", flush=True)


def print_uncached(inputs: dict[str, Features], left: dict[str, int], wanted: str) -> None:
    """What goes through the frozen part in every epoch, and why."""
    if not any(features.prefix for features in inputs.values()):
        print("cache    off: no stage's output stays the same", flush=True)
    elif any(features.augment for features in inputs.values()):
        print("cache    not of training pictures: AUGMENT changes them in every epoch", flush=True)
    if any(left.values()):
        why = "as asked" if wanted == "off" else "they do not fit (--cache disk takes a file)"
        size, count = bytes_left(inputs, left) / 1e9, sum(left.values())
        print(f"cache    off for {size:.2f} GB of features of {count:,} images: {why}", flush=True)


def joined(features: Features, kept: list[Features]) -> "Features | SplitFeatures":
    """Looks up the pieces that are kept, and computes the rest whenever it is asked for."""
    first = sum(map(len, kept))
    if first < len(features):
        kept = [*kept, piece(features, first, len(features) - first)]
    return kept[0] if len(kept) == 1 else SplitFeatures(kept)


def piece(features: Features, first: int, count: int) -> Features:
    """Features of `count` of the images, from `first` on, not filled."""
    if count == len(features):
        return features
    part = copy.copy(features)
    part.pixels, part.copies = features.pixels[first : first + count], deque()
    part.shape = (features.shape[0] // len(features) * count, *features.shape[1:])
    part.bytes = image_bytes(features) * count
    return part


class SplitFeatures:
    """Looks up what Features look up, in pieces that follow each other."""

    def __init__(self, pieces: Sequence[Features]):
        self.pieces = pieces
        firsts = itertools.accumulate([0, *map(len, pieces[:-1])])
        # What is on the host goes first, while the GPU is still busy with the step before.
        needs_gpu = [part.store is None or part.store.is_cuda for part in pieces]
        self.by_place = sorted(zip(needs_gpu, firsts, pieces))  # no two firsts are the same

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def batches(self, size, order=None, flips=None, generator=None) -> Iterator[torch.Tensor]:
        """As Features.batches; nothing is augmented here."""
        one = self.pieces[0]
        rows = torch.arange(len(self)) if order is None else order
        mirrored = torch.zeros(len(self), dtype=torch.bool) if flips is None else flips
        for some in rows.split(size):
            found = torch.empty((len(some), *one.shape[1:]), dtype=one.dtype, device=one.device)
            found = found.permute(0, 3, 1, 2)
            for _, first, part in self.by_place:
                places = ((some >= first) & (some < first + len(part))).nonzero().flatten()
                if len(places):
                    own = some[places]
                    found[places.to(one.device)] = part(own - first, mirrored[own])
            yield found
