"""How a command prints and ends, whatever reads it; and the files it is given."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, complaint

import compare
import evaluate
import plot
import train
from plumbing import cli, flags
from plumbing.cli import UnfailingStream, paths

SCRIPT = """
import sys
from pathlib import Path
from plumbing.cli import command

def main():
    for number in range(20_000):
        print("line", number, "of a class named", sys.argv[2])
    Path(sys.argv[1]).write_text("written")
    {last}

command(main, "stopped", "full")
"""


def script(file: Path, last: str = "pass", name: bytes = b"cat", **environment: str):
    """A command that prints much, then writes a file; not yet waited for."""
    words = [sys.executable, "-c", SCRIPT.format(last=last), str(file), name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, cwd=ROOT, env=os.environ | environment, **pipes)


# ---------------------------------------------------------------- when nobody reads


def test_a_command_whose_reader_leaves_goes_on_quietly(tmp_path):
    """As with | head -1."""
    process = script(tmp_path / "file")
    assert process.stdout.readline().startswith(b"line 0")
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    assert (tmp_path / "file").read_text() == "written"


@pytest.mark.slow
def test_an_error_has_its_status_though_nobody_reads(tmp_path):
    fails = "raise __import__('data').UserError('the cause')"
    process = script(tmp_path / "file", fails)
    process.stdout.close()
    assert process.stderr.read() == b"-c: error: the cause\n" and process.wait() == 2
    process = script(tmp_path / "file", fails)
    process.stderr.close()
    process.stdout.close()
    assert process.wait() == 2


@pytest.mark.slow
def test_a_reader_that_never_was(tmp_path):
    """Output to a pipe whose other end is closed before the first line."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-c", SCRIPT.format(last="pass"), str(tmp_path / "file"), "cat"]
    done = subprocess.run(words, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.stderr == b"" and done.returncode == 0


@pytest.mark.parametrize("flush", [True, False], ids=["flushed", "written"])
def test_a_stream_that_nobody_reads_swallows_what_is(flush):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as inner:
        stream = UnfailingStream(inner)
        for _ in range(2000):
            print("a line that nobody reads", file=stream, flush=flush)


def test_a_command_whose_terminal_goes_away_goes_on_quietly(tmp_path):
    """As when a connection ends under a run that ignores SIGHUP: writing is OSError 5."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    words = [sys.executable, "-c", SCRIPT.format(last="pass"), str(tmp_path / "file"), "cat"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    assert os.read(ours, 1) == b"l"
    os.close(ours)
    assert process.stderr.read() == b"" and process.wait() == 0
    assert (tmp_path / "file").read_text() == "written"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_into_a_full_disk_ends_nothing(tmp_path):
    words = [sys.executable, "-c", SCRIPT.format(last="pass"), str(tmp_path / "file"), "cat"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 0 and done.stderr == b""


def test_a_command_without_any_output_runs():
    """sys.stdout is None under pythonw, and where it was closed before the start."""
    stream = UnfailingStream(None)
    print("nothing", file=stream, flush=True)
    assert not stream.isatty()


# ---------------------------------------------------------------- a folder that may not be entered


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """A folder that another user keeps for himself."""

    def guarded(function):
        def guard(path=".", *more, **others):
            if str(path).startswith(str(tmp_path / "closed")):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *more, **others)

        return guard

    monkeypatch.setattr("builtins.open", guarded(open))
    monkeypatch.setattr(io, "open", guarded(io.open))
    for name in ("stat", "listdir", "scandir"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    for name in ("stat", "iterdir", "open"):  # which in Python 3.10 do not go through os
        monkeypatch.setattr(Path, name, guarded(getattr(Path, name)))
    return tmp_path / "closed"


@pytest.mark.parametrize(
    "main, flags",
    [
        (train.main, ["--weights", "{}/weights.pth", "--dataset", "synthetic"]),
        (train.main, ["--weights", "none", "--dataset", "folder", "--data-dir", "{}/pictures"]),
        (train.main, ["--weights", "none", "--dataset", "cifar10", "--data-dir", "{}/cifar"]),
        (evaluate.main, ["{}/epoch1.pt"]),
        (evaluate.main, ["{}/epoch1.pt", "--image", "{}/cat.jpg"]),
        (compare.main, ["{}/epoch1.pt"]),
        (plot.main, ["{}"]),
    ],
)
def test_what_may_not_be_read_is_named_in_one_line(closed, tmp_path, capsys, main, flags):
    flags = [flag.format(closed) for flag in flags]
    if main is train.main:
        flags += ["--out", tmp_path / "out", "--device", "cpu"]
    line = complaint(main, flags, capsys)
    assert str(closed) in line and "Permission denied" in line


# ---------------------------------------------------------------- what cannot be spelled


@pytest.mark.slow
def test_a_command_through_an_ascii_pipe_spells_all_names(tmp_path):
    last = "raise __import__('data').UserError(sys.argv[2])"
    name = "F\u00fcchse \u732b ".encode() + b"caf\xe9"
    utf8 = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "ascii"}
    out, err = script(tmp_path / "file", last, name, **utf8).communicate()
    shown = rb"F\xfcchse \u732b caf\udce9"
    assert out.splitlines()[0] == b"line 0 of a class named " + shown
    assert err == b"-c: error: " + shown + b"\n"


@pytest.mark.parametrize(
    "encoding, name, shown",
    [
        ("ascii", "F\u00fcchse", rb"F\xfcchse"),
        ("latin-1", "\u732b", rb"\u732b"),
        ("cp932", "\u00fc", rb"\xfc"),
        ("utf-8", "\u732b", "\u732b".encode()),
        ("utf-8", os.fsdecode(b"caf\xe9"), rb"caf\udce9"),
        ("ascii", os.fsdecode(b"caf\xe9"), rb"caf\udce9"),
    ],
)
def test_names_that_cannot_be_spelled_are_escaped(encoding, name, shown):
    inner = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print(name, file=UnfailingStream(inner), flush=True)
    assert inner.buffer.getvalue() == shown + b"\n"


def test_a_notebook_s_stream_needs_no_reconfigure():
    class Notebook:
        def __init__(self):
            self.written = []

        def write(self, text):
            self.written.append(text)
            return len(text)

        def flush(self):
            pass

    stream = UnfailingStream(Notebook())
    print("\u732b", file=stream, flush=True)
    assert "".join(stream.written) == "\u732b\n"


def test_a_patient_stream_is_still_its_stream():
    inner = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = UnfailingStream(inner)
    assert stream.encoding == "ascii" and not stream.isatty()
    print("\udcff", file=stream, flush=True)
    assert inner.buffer.getvalue() == b"\\udcff\n"


# ---------------------------------------------------------------- files by name


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("b/epoch1.pt", "a/epoch1.pt", "a/epoch2.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_patterns_are_spelled_out_in_order(place):
    assert paths(["*/epoch1.pt"]) == ["a/epoch1.pt", "b/epoch1.pt"]
    assert paths(["b/epoch1.pt", "a/epoch?.pt"]) == ["b/epoch1.pt", "a/epoch1.pt", "a/epoch2.pt"]
    assert paths(["**/epoch[2].pt"]) == ["a/epoch2.pt"]


def test_home_is_spelled_out(place):
    assert paths(["~/a/epoch1.pt"]) == [f"{place}/a/epoch1.pt"]
    assert paths(["~/*/epoch2.pt"]) == [f"{place}/a/epoch2.pt"]


def test_what_matches_nothing_stays_as_it_is_to_be_named(place):
    assert paths(["nowhere/*.pt", "c.pt"]) == ["nowhere/*.pt", "c.pt"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(place):
    for name in ("photo[1].png", "photo1.png", "what?.png"):
        (place / name).touch()
    assert paths(["photo[1].png", "what?.png"]) == ["photo[1].png", "what?.png"]


@pytest.mark.parametrize("flag, name", [("--data-dir", "data_dir"), ("--out", "out")])
def test_home_is_spelled_out_in_flags(place, flag, name):
    args = flags.parse("", train.RECIPE, [f"{flag}=~/x"])
    assert getattr(args, name) == place / "x"


def test_home_is_spelled_out_in_weights(place):
    args = flags.parse("", train.RECIPE, ["--weights=~/x.pth"])
    assert args.weights == str(place / "x.pth")


# ---------------------------------------------------------------- progress


def on_a_terminal(monkeypatch) -> None:
    """What is printed from here on goes to a cli."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(cli, "last_shown", 0.0)


@pytest.mark.parametrize("columns", ["0", "40", "200"])
def test_progress_fits_the_terminal_and_is_wiped(monkeypatch, capsys, columns):
    on_a_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", columns)
    cli.show_line("a long line, " * 20)
    cli.wipe_line()
    shown = capsys.readouterr().out.split("\r")
    assert max(map(len, shown)) < (int(columns) or 81)
    assert shown[1].startswith("a long line") and not shown[-2].strip()


def test_progress_is_shown_ten_times_a_second_at_most(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    now = [100.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    for number in range(10):
        cli.show_line(f"picture {number}")
        now[0] += 0.03
    shown = capsys.readouterr().out.split("\r")
    assert [line.strip() for line in shown[1:]] == ["picture 0", "picture 4", "picture 8"]


def test_nothing_of_it_reaches_a_file_within_a_minute(monkeypatch, capsys):
    monkeypatch.setattr(cli, "last_shown", cli.time.monotonic())
    assert list(cli.progress(["one", "two"], "filling")) == ["one", "two"]
    assert capsys.readouterr().out == ""


def test_without_a_terminal_there_is_a_whole_line_a_minute(monkeypatch, capsys):
    """As with nohup, in a batch system, or behind a notebook's exclamation mark."""
    now = [1000.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cli, "last_shown", now[0])
    for _ in cli.progress(range(25), "epoch 3, step", 100):
        now[0] += 10
    out = capsys.readouterr().out
    steps = [line.split(" of ")[0] for line in out.splitlines()]
    assert steps == [f"epoch 3, step: {step}" for step in (6, 12, 18, 24)]
    assert "\r" not in out


def test_progress_says_how_far_how_fast_and_how_long_the_run_will_take(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    now = [100.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    items = cli.progress(iter(range(18_000)), "epoch 8, step", 18_000, repeats=2)
    for _ in range(6000):
        next(items)
        now[0] += 0.01
    next(items)
    shown = capsys.readouterr().out.split("\r")[-1].strip()
    assert re.fullmatch("epoch 8, step: 5,99. of 18,000, 100 a second, 8 min left", shown)
