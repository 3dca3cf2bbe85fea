"""Where features are kept: on the device, on the host, in a file, or nowhere.

    inputs, seconds = keep({"train": inputs, "test": test}, "auto", device, folder, settings)

What does not fit in one place is split over several, and what fits nowhere is computed in every
epoch. A place that is too small in spite of the estimate is given up for the next one.
"""

import atexit
import contextlib
import copy
import functools
import itertools
import os
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
FREE_BYTES = 2 * 2**30  # left for training beside the features: 128 pictures of 224x224 a step
FREE_DISK_BYTES = 2**28  # left for checkpoints


# ---------------------------------------------------------------- filling


def keep(
    inputs: dict[str, Features],
    wanted: str,
    device: torch.device,
    folder: Path,
    settings: Settings,
) -> tuple[dict[str, "Features | Pieces"], float]:
    """Compute these features once, keep them, and say where: training's first, test's last.
    wanted: one of PLACES; folder: for a file, which is gone when the process ends; settings: of the
    training, which needs memory beside them. Returns the features, now to be looked up, and the
    seconds that it took. Raises UserError when a place that was asked for cannot hold them all."""
    features = list(inputs.values())
    start, computed = time.monotonic(), 0
    pieces = [[] for _ in features]
    # What comes out differently each time, or as it went in, is not kept.
    constant = [len(feature.prefix) > 0 and not feature.augment for feature in features]
    for place in usable_places(wanted, device) if any(constant) else ():
        # How many images of each are left, and fit here beside what training needs.
        left = [len(feature) - sum(map(len, own)) for feature, own in zip(features, pieces)]
        left = [count * keeps for count, keeps in zip(left, constant)]
        spare = spare_bytes(place, settings)
        free = free_memory(place, device, folder)
        counts = fitting(features, left, free, spare)
        if wanted != "auto" and counts != left:
            refuse(wanted, features, spare, free)
        if any(counts):
            print(describe(features, counts, place, free), flush=True)
            computed += fill_place(place, features, counts, pieces, device, folder)
    seconds = time.monotonic() - start
    if computed:
        print(f"         filled in {seconds:.1f} s, {computed / seconds:,.0f} images/s", flush=True)
    # What fits nowhere is computed whenever it is asked for.
    for feature, own in zip(features, pieces):
        first = sum(map(len, own))
        if first < len(feature):
            own.append(piece(feature, first, len(feature) - first))
    print_uncached(features, pieces, wanted)
    kept = [own[0] if len(own) == 1 else Pieces(own) for own in pieces]
    return dict(zip(inputs, kept)), seconds


def usable_places(wanted: str, device: torch.device) -> list[str]:
    """auto: where a look-up is faster than computing anew. A GPU computes 128 features sooner than
    a disk reads them; a CPU does not."""
    if wanted == "off":
        return []
    if wanted != "auto":
        return [wanted]
    return ["device", "host"] if device.type == "cuda" else ["host", "disk"]


def spare_bytes(place: str, settings: Settings) -> int:
    if place == "disk":
        return FREE_DISK_BYTES
    size, batch = settings.image_size / 224, settings.batch_size / 128
    step = batch * size**2  # what a step needs, against the usual one
    return int(FREE_BYTES * max(1, step))


def fitting(
    features: Sequence[Features], left: Sequence[int], free: int | None, spare: int
) -> list[int]:
    """How many of the images that are left fit into `free` bytes beside `spare`, the last features
    first; all of them where nobody knows what is free."""
    if free is None:
        return list(left)
    rest, counts = max(free - spare, 0), []
    for feature, count in zip(reversed(features), reversed(left)):
        one = feature.bytes // len(feature)
        counts.append(min(count, rest // one))
        rest -= counts[-1] * one
    return counts[::-1]


def fill_place(
    place: str,
    features: Sequence[Features],
    counts: Sequence[int],
    pieces: Sequence[list[Features]],
    device: torch.device,
    folder: Path,
) -> int:
    """Fills a place with so many images of each, and adds them to the pieces. The last features go
    first: all test pictures are looked up in every epoch, but of the two features of a training
    picture one. Returns how many features were computed; fewer if the place is too small."""
    computed = 0
    try:
        for feature, count, own in reversed(list(zip(features, counts, pieces))):
            if count:
                part = piece(feature, sum(map(len, own)), count)
                if place == "disk":
                    fill_file(part, folder)
                else:
                    part.fill(torch.device("cpu") if place == "host" else device, show_filling)
                own.append(part)
                computed += part.shape[0]
    except (RuntimeError, MemoryError, OSError) as error:
        if not memory_is_full(error) and getattr(error, "errno", None) not in DISK_IS_FULL:
            raise
        wipe_line()
        print(f"         it does not fit {WORDS[place]} after all", flush=True)
    return computed


show_filling = functools.partial(progress, text="filling, batch")
file_numbers = itertools.count()


def fill_file(features: Features, folder: Path) -> None:
    """Keeps features in a file that is mapped into memory, and has no name any more where the
    system allows that; elsewhere it is deleted when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".features{next(file_numbers)}.{os.getpid()}.part"
    atexit.register(file.unlink, missing_ok=True)
    try:
        with open(file, "wb") as out:
            for rows in show_filling(torch.arange(features.shape[0]).split(features.chunk)):
                block = features.compute(rows).cpu().contiguous()
                out.write(block.view(torch.uint8).numpy())
        count = features.bytes // features.dtype.itemsize
        store = torch.from_file(str(file), size=count, dtype=features.dtype)
        features.store = store.view(features.shape)
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is in use
            file.unlink()


# ---------------------------------------------------------------- what is said


def describe(
    features: Sequence[Features], counts: Sequence[int], place: str, free: int | None
) -> str:
    size = sum(part.bytes // len(part) * count for part, count in zip(features, counts)) / 1e9
    total = sum(map(len, features))
    some = "" if sum(counts) == total else f" of {sum(counts):,} of {total:,} images"
    free = "how much is free is not known" if free is None else f"{free / 1e9:.1f} GB were free"
    return f"cache    {size:.2f} GB of features{some} {WORDS[place]}, {free}"


def refuse(wanted: str, features: Sequence[Features], spare: int, free: int) -> None:
    need = sum(feature.bytes for feature in features) / 1e9
    raise UserError(
        f"--cache {wanted}: {need:.2f} GB of features and {spare / 1e9:.1f} GB to spare do not fit "
        f"({free / 1e9:.1f} GB free {WORDS[wanted]}); try --cache auto, --train-size or a smaller "
        f"--image-size"
    )


def print_uncached(
    features: Sequence[Features], pieces: Sequence[list[Features]], wanted: str
) -> None:
    """What goes through the frozen part in every epoch, and why."""
    if not any(len(feature.prefix) for feature in features):
        print("cache    off: no stage's output stays the same", flush=True)
        return
    if any(feature.augment for feature in features):
        print("cache    not of training pictures: AUGMENT changes them in every epoch", flush=True)
    rest = [own[-1] for own in pieces if own[-1].store is None and not own[-1].augment]
    if rest:
        size, count = sum(part.bytes for part in rest) / 1e9, sum(map(len, rest))
        why = "as asked" if wanted == "off" else "they do not fit (--cache disk takes a file)"
        print(f"cache    off for {size:.2f} GB of features of {count:,} images: {why}", flush=True)


# ---------------------------------------------------------------- several places


def piece(features: Features, first: int, count: int) -> Features:
    """Features of `count` of the images, from `first` on, not filled."""
    if count == len(features):
        return features
    part = copy.copy(features)
    part.pixels, part.copies = features.pixels[first : first + count], deque()
    part.shape = (features.shape[0] // len(features) * count, *features.shape[1:])
    part.bytes = features.bytes // len(features) * count
    return part


class Pieces:
    """Looks up what Features look up, in pieces that follow each other."""

    def __init__(self, pieces: Sequence[Features]):
        self.pieces = pieces
        firsts = itertools.accumulate([0, *map(len, pieces[:-1])])
        # What is on the host goes first, while the GPU is still busy with the step before.
        self.by_place = sorted(zip(firsts, pieces), key=lambda pair: needs_gpu(pair[1]))

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def __call__(self, indices: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
        """Features [B, C, H, W] of the images at `indices`, int64 [B], mirrored where `flips`,
        bool [B]; both on the CPU, where they are sorted by piece."""
        one = self.pieces[0]
        batch, height, width, channels = len(indices), *one.shape[1:]
        found = torch.empty((batch, height, width, channels), dtype=one.dtype, device=one.device)
        found = found.permute(0, 3, 1, 2)
        for first, part in self.by_place:
            here = (indices >= first) & (indices < first + len(part))
            places = here.nonzero().flatten()
            if len(places):
                found[places.to(one.device)] = part(indices[places] - first, flips[places])
        return found

    def batches(
        self,
        size: int | list[int],
        order: torch.Tensor | None = None,
        flips: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[torch.Tensor]:
        """Features of all images, as Features.batches gives them; nothing is augmented here."""
        rows = torch.arange(len(self)) if order is None else order
        mirrored = torch.zeros(len(self), dtype=torch.bool) if flips is None else flips
        for some in rows.split(size):
            yield self(some, mirrored[some])


def needs_gpu(part: Features) -> bool:
    return part.store is None or part.store.is_cuda
