"""How a command begins, what it shows while it works, and how it ends.

    parser = Parser(__doc__)                      # help is the module's docstring
    for batch in progress(batches, "training", len(batches)): ...
    if __name__ == "__main__":
        command(main, "go on with --resume", "lower --batch-size")     # a script's last line

What the user can put right ends in one line; an error of ours, in a traceback.
"""

import argparse
import contextlib
import errno
import glob
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO, TypeVar

from data import UserError
from plumbing.machine import memory_is_full

DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
Item = TypeVar("Item")
last_shown = time.monotonic()  # when show_line last wrote


class Parser(argparse.ArgumentParser):
    """Flags in full, and the module's docstring as it stands in place of a usage line."""

    def __init__(self, description: str):
        super().__init__(
            usage=argparse.SUPPRESS,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )


def whole_number(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: an integer within these bounds."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not minimum <= int(text) <= maximum:
            bounds = f"a whole number from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text!r}")
        return int(text)

    return parse


def paths(texts: list[str]) -> list[str]:
    """Replaces patterns such as results/*/epoch10.pt by the files that match, as Windows' shells do
    not. What matches nothing stays, to be named in an error."""
    found = []
    for text in map(os.path.expanduser, texts):
        matching = [] if os.path.exists(text) else sorted(glob.glob(text))
        found += matching or [text]
    return found


def progress(
    items: Iterable[Item], text: str, total: int | None = None, repeats: int = 0
) -> Iterator[Item]:
    """The items as they are. A line shows how many are done, and how long the run still takes.
    total: how many there are, if they have no len; repeats: how many more epochs of as many."""
    total = len(items) if total is None else total
    start = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        rate = done / max(time.monotonic() - start, 1e-9)
        left = (total * (1 + repeats) - done) / rate
        show_line(f"{text}: {done:,} of {total:,}, {rate:,.0f} a second, {left / 60:.0f} min left")
    wipe_line()


def show_line(text: str) -> None:
    """A line in place on a terminal, ten times a second at most; elsewhere one line a minute."""
    global last_shown
    terminal = sys.stdout.isatty()
    interval_seconds = 0.1 if terminal else 60
    if time.monotonic() - last_shown < interval_seconds:
        return
    last_shown = time.monotonic()
    if not terminal:
        print(text, flush=True)
        return
    width = shutil.get_terminal_size().columns - 1
    print(f"\r{text[:width]:{width}}", end="", flush=True)


def wipe_line() -> None:
    """Empties show_line's line on a terminal, for a line that stays."""
    if sys.stdout.isatty():
        print("\r" + " " * (shutil.get_terminal_size().columns - 1), end="\r", flush=True)


def command(main: Callable[[], None], when_stopped: str, when_full: str) -> None:
    """Run a script so that it ends with one line where the user can put something right, Ctrl-C
    with status 130 and SIGTERM with 143. when_stopped, when_full: what to do then."""

    def terminate(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one changes nothing
        raise KeyboardInterrupt(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)
    sys.stdout, sys.stderr = UnfailingStream(sys.stdout), UnfailingStream(sys.stderr)
    try:
        return main()
    except KeyboardInterrupt as stop:
        status, line = 130, f"stopped; {when_stopped}"
        if stop.args:
            status = stop.args[0]
    except Exception as error:
        status, line = outcome(error, when_full)
        if status is None:
            raise
    wipe_line()
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(status)


def outcome(error: Exception, when_full: str) -> tuple[int | None, str]:
    """The exit status and the line for an error; None for one of ours, which is a traceback."""
    cause = error.__cause__ if isinstance(error, UserError) else error
    disk_is_full = isinstance(cause, OSError) and cause.errno in DISK_IS_FULL
    if disk_is_full or isinstance(error, FloatingPointError):
        return 1, f"error: {error}"
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, PermissionError) and error.filename:
        return 2, f"error: cannot open {error.filename} ({error.strerror})"
    if memory_is_full(error):
        return 1, f"error: the memory is full: {when_full}"
    return None, ""


class UnfailingStream:
    """A stream to print to that never ends a command. A character that its encoding lacks is
    printed as \\xfc. After the reader has gone, as with `| head -1`, or the terminal has been
    closed, what is printed is lost. stream: None under pythonw, which has none."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115  # until the process ends
        with contextlib.suppress(AttributeError):  # of a notebook
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, function: Callable, *arguments: str) -> None:
        try:
            function(*arguments)
        except OSError:  # from here on the stream leads nowhere, so that nothing fails at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)
