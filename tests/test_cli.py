"""How a command prints and ends, whatever reads it; and the files it is given."""

import io
import os
import re
import sys
from pathlib import Path

import pytest

import train
from data import UserError
from plumbing import cli, flags
from plumbing.cli import UnfailingStream, paths


def closed_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full_disk() -> int:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("flush", [True, False], ids=["flushed", "written"])
@pytest.mark.parametrize("reader", [closed_pipe, full_disk])
def test_a_command_that_nobody_reads_goes_on_and_has_its_status(monkeypatch, capsys, reader, flush):
    done = []

    def main():
        for _ in range(2000):
            print("a line that nobody reads", flush=flush)
        done.append("all")
        raise UserError("the cause")

    with open(reader(), "w") as inner, pytest.raises(SystemExit) as stopped:
        monkeypatch.setattr(sys, "stdout", inner)
        monkeypatch.setattr(sys, "stderr", sys.stderr)
        cli.command(main, "stopped", "full")
    assert done == ["all"] and stopped.value.code == 2
    assert capsys.readouterr().err.endswith(": error: the cause\n")


def test_no_stream_and_a_notebook_s_are_written_to_as_they_are():
    stream = UnfailingStream(None)  # sys.stdout under pythonw, or where it was closed
    print("nothing", file=stream, flush=True)
    assert not stream.isatty()
    inner = io.StringIO()  # which has no reconfigure
    print("\u732b", file=UnfailingStream(inner), flush=True)
    assert inner.getvalue() == "\u732b\n"


FULL_DISK = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("the cause"), 2, "error: the cause"),
        (PermissionError(13, "not allowed", "a.pt"), 2, "error: cannot open a.pt (not allowed)"),
        (FULL_DISK, 1, "error: [Errno 28] No space left on device"),
        (MemoryError(), 1, "error: the memory is full: lower it"),
        (OSError(5, "Input/output error"), None, ""),  # ours, as the next ones: tracebacks
        (FileNotFoundError(2, "No such file or directory"), None, ""),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None, ""),
    ],
)
def test_what_the_user_can_put_right_has_a_status_and_a_line(error, status, line):
    assert cli.outcome(error, "lower it") == (status, line)


@pytest.mark.parametrize(
    "encoding, name, shown",
    [
        ("ascii", "F\u00fcchse", rb"F\xfcchse"),
        ("cp932", "\u00fc", rb"\xfc"),
        ("utf-8", "\u732b", "\u732b".encode()),
        ("utf-8", os.fsdecode(b"caf\xe9"), rb"caf\udce9"),
    ],
)
def test_names_that_cannot_be_spelled_are_escaped(encoding, name, shown):
    inner = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    stream = UnfailingStream(inner)
    print(name, file=stream, flush=True)
    assert inner.buffer.getvalue() == shown + b"\n"
    assert stream.encoding == encoding and not stream.isatty()


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("b/epoch1.pt", "a/epoch1.pt", "a/epoch2.pt", "photo[1].png", "photo1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "names, found",
    [
        (["*/epoch1.pt"], ["a/epoch1.pt", "b/epoch1.pt"]),
        (["b/epoch1.pt", "a/epoch?.pt"], ["b/epoch1.pt", "a/epoch1.pt", "a/epoch2.pt"]),
        (["~/*/epoch2.pt", "~/c.pt"], ["{}/a/epoch2.pt", "{}/c.pt"]),
        (["nowhere/*.pt", "c.pt"], ["nowhere/*.pt", "c.pt"]),  # to be named
        (["photo[1].png"], ["photo[1].png"]),  # looks like a pattern
    ],
)
def test_patterns_and_home_are_spelled_out_in_order(place, names, found):
    assert paths(names) == [name.format(place) for name in found]


def test_home_is_spelled_out_in_flags(place):
    words = ["--data-dir=~/x", "--out=~/y", "--weights=~/z.pth"]
    args = flags.parse("", train.RECIPE, words)
    assert (args.data_dir, args.out) == (place / "x", place / "y")
    assert args.weights == str(place / "z.pth")


@pytest.fixture
def clock(monkeypatch):
    """clock[0] is the time in seconds, and nothing has been shown for long."""
    now = [100.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cli, "last_shown", 0.0)
    return now


@pytest.mark.parametrize("columns", ["0", "40", "200"])
def test_progress_fits_the_terminal_and_is_wiped(monkeypatch, capsys, clock, columns):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", columns)
    cli.show_line("a long line, " * 20)
    cli.wipe_line()
    shown = capsys.readouterr().out.split("\r")
    assert max(map(len, shown)) < (int(columns) or 81)
    assert shown[1].startswith("a long line") and not shown[-2].strip()


def test_progress_is_shown_ten_times_a_second_at_most(monkeypatch, capsys, clock):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for number in range(10):
        cli.show_line(f"picture {number}")
        clock[0] += 0.03
    shown = capsys.readouterr().out.split("\r")
    assert [line.strip() for line in shown[1:]] == ["picture 0", "picture 4", "picture 8"]


def test_without_a_terminal_there_is_a_whole_line_a_minute(monkeypatch, capsys, clock):
    monkeypatch.setattr(cli, "last_shown", clock[0])
    for _ in cli.progress(range(25), "epoch 3, step", 100):
        clock[0] += 10
    out = capsys.readouterr().out
    assert re.findall("epoch 3, step: ([0-9]+) of", out) == ["6", "12", "18", "24"]
    assert out.count("\n") == 4 and "\r" not in out


def test_progress_says_how_far_how_fast_and_how_long_the_run_will_take(monkeypatch, capsys, clock):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    items = cli.progress(iter(range(18_000)), "epoch 8, step", 18_000, repeats=2)
    for _ in range(6000):
        next(items)
        clock[0] += 0.01
    assert next(items) == 6000
    shown = capsys.readouterr().out.split("\r")[-1].strip()
    assert re.fullmatch("epoch 8, step: 5,99. of 18,000, 100 a second, 8 min left", shown)
