"""A run's folder: its lock, its checkpoint, and how to go on from one.

    with locked(folder):                                # no other run writes there meanwhile
        write(folder, checkpoint)                       # checkpoint.pt and history.csv
    checkpoint, model = read_checkpoint("results/cifar10-layer4-e10-s0/checkpoint.pt")
"""

import fcntl
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

import data
import freeze
from machine import memory_is_full

NEEDED = {"arguments", "classes", "device", "history", "precision", "seconds", "settings", "stages", "test_correct", "test_images",
          "train_images", "trainable_parameters", "versions"}


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Makes a directory and keeps other runs out of it, by a lock that dies with this process.
    What was made and is empty in the end is removed again. Raises OSError."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    file = directory / ".lock"
    with ExitStack() as undo:
        @undo.callback
        def remove_what_is_empty() -> None:
            with suppress(OSError):
                for path in made:
                    path.rmdir()

        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = undo.enter_context(open(file, "w"))
        except OSError as error:
            raise OSError(f"cannot write to {directory} ({error.strerror}): choose another --out") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(lock.fileno()).st_nlink:  # removed by the run before, just now
                raise BlockingIOError
        except BlockingIOError:
            raise OSError(f"another run is writing to {directory}: wait for its end, or choose another --out") from None
        except OSError as error:
            file.unlink(missing_ok=True)
            raise OSError(f"cannot lock {directory} ({error.strerror}): choose an --out on a local disk") from error
        undo.callback(file.unlink, missing_ok=True)
        data.remove_leftovers(directory)
        yield


def write(directory: Path, checkpoint: dict) -> None:
    """checkpoint.pt, then history.csv, each whole or not at all. Raises OSError."""
    file = io.BytesIO()  # torch.save says less than a sentence when a disk is full
    torch.save(checkpoint, file)
    data.write_file(directory / "checkpoint.pt", file.getbuffer())
    write_history(directory, checkpoint["history"])


def write_history(directory: Path, history: list[dict]) -> None:
    data.write_csv(directory / "history.csv", history[0], [row.values() for row in history])


def read_checkpoint(path: str | Path) -> tuple[dict, nn.Module]:
    """What train.py saved, and the whole trained model, rebuilt from nothing else.
    Raises OSError or ValueError naming the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = freeze.build(len(checkpoint["classes"]))
        model.load_state_dict(checkpoint["model"])
        if not NEEDED <= checkpoint.keys() or len(checkpoint["history"]) != checkpoint["history"][-1]["epoch"]:
            raise KeyError("not what train.py writes")
    except Exception as error:  # torch.load meets a foreign file with many kinds of errors
        if isinstance(error, OSError):
            raise OSError(f"cannot read {path} ({error.strerror})") from error
        if memory_is_full(error):
            raise
        raise ValueError(f"{path} is not a checkpoint that train.py wrote whole: delete it, or name another") from error
    return checkpoint, model


def begun(directories: dict[int, Path], settings: dict) -> dict[int, dict]:
    """The checkpoints that are there already, by number of epochs. settings: what has to be the same.
    Raises ValueError or OSError for one that is damaged or of another run."""
    saved = {}
    for epochs, directory in directories.items():
        file = directory / "checkpoint.pt"
        if file.exists():
            saved[epochs], _ = read_checkpoint(file)
            for name, value in settings.items():
                before = saved[epochs]["settings"].get(name)
                if before != value:
                    raise ValueError(f"{file} was trained with {name} {before}, not {value}: "
                                     f"go on as it began, use another --out, or delete {directory}")
    return saved


def fingerprint(*tensors: torch.Tensor, text: str = "") -> str:
    """The first 64 bits of the sha256 of a text and of tensors' values, in hexadecimal."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
