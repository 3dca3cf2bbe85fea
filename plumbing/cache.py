"""Where features are kept: on the device, on the host, in a file, or nowhere.

    seconds = keep([inputs, test_inputs], "auto", device, folder)

A place that is too small in spite of the estimate is given up for the next one.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from data import UserError
from features import Features
from plumbing.files import locked, remove_leftovers, whole_file
from plumbing.machine import free_memory, memory_is_full
from plumbing.terminal import progress, reporter

PLACES = ("auto", "device", "host", "disk", "off")
ROOM = 2 * 2**30  # bytes left free for training beside the features


def keep(features: Sequence[Features], wanted: str, device: torch.device, folder: Path) -> float:
    """Choose a place for these features, fill it, and say so. wanted: one of PLACES. Returns the
    seconds that it took. Raises UserError."""
    place, why = choose(wanted, features, device, folder)
    print(f"cache    {why}", flush=True)
    start = time.monotonic()
    place, computed = fill_all(features, place, device, folder)
    seconds = time.monotonic() - start
    if computed:
        print(f"         filled in {seconds:.1f} s, {computed / seconds:,.0f} images/s", flush=True)
    if place == "disk":
        whose = "kept for later runs" if computed else "computed by an earlier run"
        print(f"         {whose}; to delete: rm -r {folder}")
    return seconds


def choose(
    wanted: str, features: Sequence[Features], device: torch.device, folder: Path
) -> tuple[str, str]:
    """Where to keep these features, and the reason in words: "auto" takes a CUDA device where
    they fit beside ROOM for training, then the host's memory, then "off"; "disk", in `folder`,
    is for who asks for it, since it stays. Raises UserError when a place that was asked for
    cannot hold them."""
    need = sum(feature.bytes for feature in features)
    text = f"{need / 1e9:.2f} GB of features"
    if wanted == "off":
        return "off", f"off as asked, {text} recomputed in every epoch"
    if wanted == "auto" and not len(features[0].prefix):
        return "off", "off, no stage whose output stays the same"
    if wanted == "disk":
        remove_dead_parts(folder)
        need = sum(feature.bytes for feature in features if not file_of(feature, folder).exists())
    places = [wanted]
    if wanted == "auto":
        places = ["device", "host"] if device.type == "cuda" else ["host"]
    where = {"device": "in device memory", "host": "in host memory", "disk": f"in {folder}"}
    found = []
    for place in places:
        free = free_memory(place, device, folder)
        if free is None:
            return place, f"{text} {where[place]}, how much is free is not known"
        if need + room(place, need) <= free:
            return place, f"{text} {where[place]}, {free / 1e9:.1f} GB were free"
        found.append(f"{free / 1e9:.1f} GB free {where[place]}")
    spare = f"{room(places[-1], need) / 1e9:.1f} GB to spare"
    shortage = f"{text} and {spare} do not fit ({', '.join(found)})"
    if wanted != "auto":
        remedy = "try --cache off, --train-size or a smaller --image-size"
        raise UserError(f"--cache {wanted}: {shortage}; {remedy}")
    return "off", f"off, {shortage}; --cache disk takes a file"


def room(place: str, need: int) -> int:
    """Bytes to leave free: for training, or on a disk that is written to, for checkpoints."""
    if place != "disk":
        return ROOM
    return ROOM // 8 if need else 0


def remove_dead_parts(folder: Path) -> None:
    """Removes what killed fills left, of whatever features; not what is being written now."""
    for part in folder.glob(".*.features.*.part"):
        name = part.name[1:].rsplit(".", 2)[0]
        with contextlib.suppress(UserError), locked(folder, name):
            remove_leftovers(folder, name)


def fill_all(
    features: Sequence[Features], place: str, device: torch.device, folder: Path
) -> tuple[str, int]:
    """Fill them, in the next place if memory runs out in this one after all. Returns where they
    are now, and how many features were computed. Raises UserError."""
    try:
        return place, sum(fill(feature, place, device, folder) for feature in features)
    except (RuntimeError, MemoryError) as error:
        if not memory_is_full(error):
            raise
        for feature in features:
            feature.store = None
    after = "off"
    if place == "device":
        after, _ = choose("auto", features, torch.device("cpu"), folder)
    progress()
    print(f"         does not fit after all (--cache {place}): {after}", flush=True)
    return fill_all(features, after, device, folder)


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


def fill_file(features: Features, folder: Path) -> int:
    """Take the features from their file, which an earlier run may have written, or write it."""
    file = file_of(features, folder)
    with locked(folder, file.name, wait=True):
        remove_leftovers(folder, file.name)
        if found(features, file):
            return 0
        try:
            with whole_file(file) as part, open(part, "wb") as out:
                for block in features.blocks(reporter("filling")):
                    out.write(block.cpu().contiguous().view(torch.uint8).numpy())
                out.flush()
                os.fsync(out.fileno())  # before it has its name: only some rows are checked later
        except OSError as error:
            reason = f"cannot write {file} ({error.strerror})"
            raise UserError(f"{reason}: try --cache off") from error
        progress()
        if not found(features, file):
            raise UserError(f"{file} does not hold what was written to it: try --cache off")
    return len(features.store)


def file_of(features: Features, folder: Path) -> Path:
    """These features' file, named by a hash of all that they depend on."""
    settings = (features.prefix, features.shape, features.image_size, features.dtype)
    text = repr((*settings, features.device.type))
    tensors = [*features.prefix.state_dict().values(), features.pixels]
    return folder / f"{fingerprint(*tensors, text=text)}.features"


def found(features: Features, file: Path) -> bool:
    """Takes a file as the store if it is whole and some rows are what the prefix computes now."""
    if not file.is_file() or file.stat().st_size != features.bytes:
        return False
    count = features.bytes // features.dtype.itemsize
    store = torch.from_file(str(file), size=count, dtype=features.dtype).view(features.shape)
    rows = torch.linspace(0, len(store) - 1, 16).long()
    expected = features.compute(rows).cpu()
    if not (store[rows] - expected).norm() <= 0.01 * expected.norm():
        return False
    features.store = store
    return True


def fingerprint(*tensors: torch.Tensor, text: str = "") -> str:
    """The first 64 bits of the sha256 of a text and of tensors' values, in hexadecimal."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
