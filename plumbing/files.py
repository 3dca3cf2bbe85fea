"""Files that appear whole or not at all, CSV files, locks that die with their process, hashes."""

import csv
import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from data import UserError


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yields a path beside `file` to write to; what was written gets the name `file` at the end,
    and disappears if anything went wrong, so the file is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Removes what whole_file's callers were writing here when they were killed. For who holds
    the lock under which `name` is written."""
    for part in folder.glob(f".{name}.*.part"):
        part.unlink(missing_ok=True)


def write_file(file: str | Path, content: bytes | memoryview) -> None:
    """A file that appears whole or not at all. Raises UserError, on a full disk for one."""
    try:
        with whole_file(Path(file)) as part:
            part.write_bytes(content)
    except OSError as error:
        kept = "what was there before is kept"
        raise UserError(f"cannot write {file} ({error.strerror}): {kept}") from error


def write_csv(path: str | Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    """A CSV file that appears whole or not at all. Raises UserError."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_file(path, text.getvalue().encode("utf-8", "backslashreplace"))


def write_rows(path: str | Path, rows: list[dict]) -> None:
    """A CSV file of rows by column; what only some rows have is blank in the others."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(path, columns, [[row.get(name, "") for name in columns] for row in rows])


def check_writable(file: str | Path) -> None:
    """Raises the UserError that write_file would: to be told before hours of work, not after."""
    file = Path(file).absolute()
    try:
        tempfile.TemporaryFile(dir=nearest(file.parent)).close()
        if file.is_dir():
            raise IsADirectoryError(None, "it is a folder")
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}): name another file") from error


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


@contextmanager
def locked(out: Path, name: str, wait: bool = False) -> Iterator[None]:
    """Keeps others away from `name` in the folder `out`, by a lock that dies with this process.
    filelock leaves the lock's file behind, so that lies in out/.locks. wait: until it is free.
    Raises UserError."""
    file = out / ".locks" / f"{name}.lock"
    patience = -1 if wait else 0
    lock = FileLock(file, timeout=patience)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        busy = f"another run is writing to {out / name}"
        raise UserError(f"{busy}: wait for its end, or choose another --out") from None
    except NotImplementedError as error:
        raise UserError(f"cannot lock {file}: choose an --out on a local disk") from error
    except OSError as error:
        reason = f"cannot write to {out} ({error.strerror})"
        raise UserError(f"{reason}: choose another --out, on a local disk") from error
    try:
        yield
    finally:
        lock.release()


def fingerprint(*tensors: torch.Tensor) -> str:
    """The first 64 bits of the sha256 of tensors' values, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
