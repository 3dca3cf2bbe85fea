"""A run's folder: its lock, its checkpoint, and how to go on from one.

    with locked(folder):                                # no other run writes there meanwhile
        write(folder, checkpoint)                       # checkpoint.pt and history.csv
    checkpoint, model = read_checkpoint("results/cifar10-layer4-e10-s0/checkpoint.pt")

A checkpoint is a dictionary of plain values and tensors, so that torch.load reads it with
weights_only=True, which runs nothing that is hidden in a file.
"""

import csv
import fcntl
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

import data
import freeze

NEEDED = {"arguments", "classes", "device", "history", "model", "optimizer", "precision", "scaler", "seconds", "settings",
          "stages", "train_images", "trainable_parameters", "versions"}  # what is asked of a checkpoint


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Makes a directory and keeps other runs out of it, by a lock that dies with this process.
    What was made and is empty in the end is removed again. Raises OSError."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    file, descriptor = directory / ".lock", None
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(descriptor).st_nlink:  # removed by the run before, just now
                raise BlockingIOError
        except BlockingIOError:
            os.close(descriptor)
            raise OSError(f"another run is writing to {directory}: wait for its end, or choose another --out") from None
        except OSError as error:
            raise OSError(f"cannot write to {directory} ({error.strerror}): choose another --out") from error
        try:
            for part in directory.glob(".*.part"):  # what a killed run was writing
                part.unlink()
            yield
        finally:
            file.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def write(directory: Path, checkpoint: dict) -> None:
    """checkpoint.pt, then history.csv, each whole or not at all. Raises OSError."""
    file = io.BytesIO()  # torch.save says less than a sentence when a disk is full
    torch.save(checkpoint, file)
    data.write_file(directory / "checkpoint.pt", file.getbuffer())
    write_history(directory, checkpoint["history"])


def write_history(directory: Path, history: list[dict]) -> None:
    write_csv(directory / "history.csv", history[0], [row.values() for row in history])


def write_csv(path: str | Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    """A CSV file that appears whole or not at all. Raises OSError."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    data.write_file(path, text.getvalue().encode())


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
        raise ValueError(f"{path} is not a checkpoint that train.py wrote whole") from error
    return checkpoint, model


def resume(directories: dict[int, Path], settings: dict) -> tuple[dict | None, dict[int, list[dict]]]:
    """The checkpoint to go on from, if there is one, and the history of each run that has begun.

    directories: by number of epochs. A run of 50 epochs can go on from one of 10, and one of 10
    from the first epochs of one of 50. settings: what has to be the same.
    Raises ValueError or OSError for a checkpoint that is damaged or of another run.
    """
    saved = {}
    for epochs, directory in directories.items():
        file = directory / "checkpoint.pt"
        if file.exists():
            saved[epochs], _ = read_checkpoint(file)
            before = saved[epochs]["settings"]
            for name, value in settings.items():
                if before.get(name) != value:
                    raise ValueError(f"--resume: {file} was trained with {name} {before.get(name, 'unknown')}, not {value}: "
                                     "use that, or another --out")
    done = {epochs: checkpoint["history"] for epochs, checkpoint in saved.items()}
    first = min((epochs for epochs in directories if len(done.get(epochs, [])) < epochs), default=0)
    usable = [checkpoint for checkpoint in saved.values() if len(checkpoint["history"]) <= first]
    return max(usable, key=lambda checkpoint: len(checkpoint["history"]), default=None), done


def fingerprint(*tensors: torch.Tensor) -> str:
    """The first 64 bits of the sha256 of tensors' values, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
