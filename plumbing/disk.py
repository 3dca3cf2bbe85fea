"""Features in a file, for later runs.

The file is named by a hash of all that the features depend on: another run with the same frozen
part and the same pictures finds it.
"""

import contextlib
import os
from pathlib import Path

import torch

from data import UserError
from features import Features
from plumbing.files import fingerprint, locked, remove_leftovers, whole_file
from plumbing.terminal import progress, reporter


def remove_dead_parts(folder: Path) -> None:
    """Removes what killed fills left, of whatever features; not what is being written now."""
    for part in folder.glob(".*.features.*.part"):
        name = part.name[1:].rsplit(".", 2)[0]
        with contextlib.suppress(UserError), locked(folder, name):
            remove_leftovers(folder, name)


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
