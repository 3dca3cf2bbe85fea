"""Files that appear whole or not at all, locks that die with their process, hashes."""

import csv
import hashlib
import io
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from data import UserError

PLAIN = (torch.Tensor, str, int, float, type(None))  # what torch.load reads with weights_only=True
TIMEOUT_SECONDS = 20  # that a host may stay silent during a download


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to, which is renamed at the end, or removed after an error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_file(file: str | Path, content: bytes | memoryview) -> None:
    """A whole file. Raises UserError, on a full disk for one."""
    try:
        with whole_file(Path(file)) as part:
            part.write_bytes(content)
    except OSError as error:
        kept = "what was there before is kept"
        raise UserError(f"cannot write {file} ({error.strerror}): {kept}") from error


def write_rows(path: str | Path, rows: list[dict], columns: Iterable[str] = ()) -> None:
    """A whole CSV file of rows by column; what only some rows have is blank in the others. columns:
    those that come first, and are there without rows too. Raises UserError."""
    text = io.StringIO(newline="")
    found = (name for row in rows for name in row)
    writer = csv.DictWriter(text, list(dict.fromkeys([*columns, *found])))
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode("utf-8", "backslashreplace"))


def write_tensors(path: str | Path, content: dict) -> None:
    """A file for torch.load with weights_only=True. Raises UserError, also for what that does not
    read, since it would be too late to notice that when the file is needed."""
    file = io.BytesIO()  # since torch's error of a full disk names no cause
    torch.save(plain(content), file)
    write_file(path, file.getbuffer())


def plain(value: object) -> object:
    """The same with Python's numbers for NumPy's. Raises UserError for what is not PLAIN."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {name: plain(inside) for name, inside in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if not isinstance(value, PLAIN):
        kind = type(value).__name__
        raise UserError(f"a checkpoint takes tensors and plain values alone, not a {kind}")
    return value


def writable(text: str | Path) -> Path:
    """An argparse type: a file to write. Raises UserError before hours of work, not after them."""
    file = Path(text).expanduser().absolute()
    try:
        tempfile.TemporaryFile(dir=nearest(file.parent)).close()
        if file.is_dir():
            raise IsADirectoryError(None, "it is a folder")
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}): name another file") from error
    return file


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def locked(out: Path, name: str, wait: bool = False) -> AbstractContextManager:
    """Keeps others away from `name` in the folder `out` until the end of a `with`, by a lock that
    dies with this process. wait: until it is free. Raises UserError."""
    file = out / ".locks" / f"{name}.lock"  # a folder of its own, since filelock leaves the file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(file).acquire(blocking=wait)
    except Timeout as error:
        busy = f"another run is writing to {out / name}"
        raise UserError(f"{busy}: wait for its end, or choose another --out") from error
    except (OSError, NotImplementedError) as error:
        where = "choose another --out, on a local disk"
        raise UserError(f"cannot lock {file} ({error}): {where}") from error


@contextmanager
def socket_timeout() -> Iterator[None]:
    """Neither torchvision nor torch.hub ends a download from which nothing comes any more."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def fingerprint(*tensors: torch.Tensor) -> str:
    """The first 64 bits of the sha256 of tensors' values, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
