"""Where features are kept: on the device, on the host, in a file, or nowhere.

    inputs, test_inputs, seconds = keep([inputs, test_inputs], "auto", device, folder)

What does not fit in one place is split over several. A place that is too small in spite of the
estimate is given up for the next one.
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from data import UserError
from features import Features
from plumbing.disk import file_of, fill_file, remove_dead_parts
from plumbing.machine import free_memory, memory_is_full
from plumbing.split import Joined, joined, piece
from plumbing.terminal import progress, reporter

PLACES = ("auto", "device", "host", "disk", "off")
WORDS = {"device": "in device memory", "host": "in host memory", "off": "computed in every epoch"}
ROOM = 2 * 2**30  # bytes left free for training beside the features


def keep(
    features: Sequence[Features],
    wanted: str,
    device: torch.device,
    folder: Path,
    batch_size: int = 128,
) -> tuple[Features | Joined | float, ...]:
    """Choose places for these features, fill them, and say so. wanted: one of PLACES; batch_size:
    of training, which needs memory beside them. Returns the features, now to be looked up, and the
    seconds that it took. Raises UserError."""
    shares, why = choose(wanted, features, device, folder, batch_size=batch_size)
    print(f"cache    {why}", flush=True)
    start = time.monotonic()
    features, shares, computed = fill_all(features, shares, device, folder, batch_size=batch_size)
    seconds = time.monotonic() - start
    if computed:
        print(f"         filled in {seconds:.1f} s, {computed / seconds:,.0f} images/s", flush=True)
    if "disk" in shares:
        whose = "kept for later runs" if computed else "computed by an earlier run"
        print(f"         {whose}; to delete: rm -r {folder}")
    return *features, seconds


def choose(
    wanted: str,
    features: Sequence[Features],
    device: torch.device,
    folder: Path,
    places: Sequence[str] = ("device", "host"),
    batch_size: int = 128,
) -> tuple[dict[str, list[int]], str]:
    """Where to keep these features: by place, how many images of each; and the reason in words.
    "auto" takes of `places` as many as fit beside ROOM for training, on a CUDA device first, and
    leaves the rest "off"; "disk", in `folder`, is for who asks for it, since it stays. Raises
    UserError when a place that was asked for cannot hold them all."""
    need = sum(feature.bytes for feature in features)
    everything = [len(feature) for feature in features]
    text = f"{need / 1e9:.2f} GB of features"
    if wanted == "off":
        return {"off": everything}, f"off as asked, {text} recomputed in every epoch"
    if wanted == "auto":
        if not len(features[0].prefix):
            return {"off": everything}, "off, no stage whose output stays the same"
        usable = [place for place in places if place == "host" or device.type == "cuda"]
        return share(features, usable, device, batch_size)
    if wanted == "disk":
        remove_dead_parts(folder)
        need = sum(feature.bytes for feature in features if not file_of(feature, folder).exists())
    where = WORDS.get(wanted, f"in {folder}")
    free, spare = free_memory(wanted, device, folder), room(wanted, need)
    if free is not None and need + spare > free:
        raise UserError(
            f"--cache {wanted}: {text} and {spare / 1e9:.1f} GB to spare do not fit "
            f"({free / 1e9:.1f} GB free {where}); try --cache auto, --train-size or a smaller "
            f"--image-size"
        )
    return {wanted: everything}, f"{text} {where}, {how_much(free)}"


def how_much(free: int | None) -> str:
    if free is None:
        return "how much is free is not known"
    return f"{free / 1e9:.1f} GB were free"


def room(place: str, need: int) -> int:
    """Bytes to leave free: for training, or on a disk that is written to, for checkpoints."""
    if place != "disk":
        return ROOM
    return ROOM // 8 if need else 0


def share(
    features: Sequence[Features], places: Sequence[str], device: torch.device, batch_size: int
) -> tuple[dict[str, list[int]], str]:
    """By place, how many images of each it takes, the first place first; and that in words."""
    left, shares, found = [len(feature) for feature in features], {}, {}
    step = batch_size / 128 * (features[0].image_size / 224) ** 2  # what one needs, against ours
    spare = int(ROOM * max(1, step))
    for place in places:
        free = free_memory(place, device, Path())
        found[place] = f"{WORDS[place]}, {how_much(free)}"
        taken = left
        if free is not None:
            taken = fitting(features, left, free - spare)
        if any(taken):
            shares[place] = taken
            left = [count - kept for count, kept in zip(left, taken)]
    if any(left):
        shares["off"] = left
    return shares, described(features, shares, found, spare)


def described(
    features: Sequence[Features], shares: dict[str, list[int]], found: dict[str, str], spare: int
) -> str:
    """What the shares come to. found: by place, what was free there."""
    text = f"{sum(feature.bytes for feature in features) / 1e9:.2f} GB of features"
    first, *others = shares
    hint = " (--cache disk takes a file)" if "off" in shares else ""
    if others:
        total = sum(len(feature) for feature in features)
        counts = [f"{sum(taken):,} {WORDS[place]}" for place, taken in shares.items()]
        return f"{text}, of {total:,} images {', '.join(counts)}{hint}"
    if first == "off":
        places = "; ".join(found.values())
        return f"off, {text} and {spare / 1e9:.1f} GB to spare do not fit {places}{hint}"
    return f"{text} {found[first]}"


def fitting(features: Sequence[Features], left: Sequence[int], free: int) -> list[int]:
    """How many of the images that are left fit into so many bytes. The last features come first:
    test's are all looked up in every epoch, of training's two of an image one is."""
    taken = []
    for feature, count in zip(reversed(features), reversed(left)):
        one = feature.bytes // len(feature)
        taken.append(min(count, max(free, 0) // one))
        free -= taken[-1] * one
    return taken[::-1]


def fill_all(
    features: Sequence[Features],
    shares: dict[str, list[int]],
    device: torch.device,
    folder: Path,
    places: Sequence[str] = ("device", "host"),
    batch_size: int = 128,
) -> tuple[list[Features | Joined], dict[str, list[int]], int]:
    """Fill each place with its share, or if memory runs out in one after all, the others. Returns
    the features, to be looked up, their shares, and how many were computed. Raises UserError."""
    pieces, computed = [[] for _ in features], 0
    try:
        for place, counts in shares.items():
            for feature, count, own in zip(features, counts, pieces):
                if count:
                    own.append(piece(feature, sum(map(len, own)), count))
                    computed += fill(own[-1], place, device, folder)
        return [joined(own) for own in pieces], shares, computed
    except (RuntimeError, MemoryError) as error:
        if not memory_is_full(error):
            raise
    for part in itertools.chain(*pieces):
        part.store = None
    places = [other for other in places if other != place]
    shares, why = choose("auto", features, device, folder, places, batch_size)
    progress()
    where = WORDS.get(place, f"in {folder}")
    print(f"         does not fit {where} after all: {why}", flush=True)
    return fill_all(features, shares, device, folder, places, batch_size)


def fill(features: Features, place: str, device: torch.device, folder: Path) -> int:
    """Compute every feature once and keep it there. Returns how many were computed."""
    if place == "off":
        return 0
    if place == "disk":
        return fill_file(features, folder)
    if place == "host":
        device = torch.device("cpu")
    features.fill(device, reporter("filling"))
    progress()
    return len(features.store)
