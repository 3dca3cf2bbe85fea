"""What a killed, stopped, doubled, starved or diverging run leaves, and how it goes on."""

import errno
import fcntl
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, checkpoint, complaint, history

import compare
import evaluate
import features
import freeze
import train
from data import UserError
from plumbing import datasets
from plumbing import run as runs
from plumbing.cli import command
from plumbing.files import locked
from study import representations

LOSSES = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
QUICK = (*SMALL, "--image-size", "32")


@pytest.fixture
def every_epoch(monkeypatch):
    """A checkpoint after every epoch, not now and then."""
    monkeypatch.setattr(runs, "CHECKPOINT_INTERVAL", 0)
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0)


def start_script(script: str, *flags: str) -> subprocess.Popen:
    """A process of its own, in which Ctrl-C works even if this one has it switched off."""

    def hear_ctrl_c() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(
        [sys.executable, "-u", str(ROOT / script), *flags],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_ctrl_c,
    )


def last_line(main, status: int, capsys) -> str:
    """What a command prints on stderr as it ends with this status: one line."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        command(main, "so", "lower --batch-size")
    signal.signal(signal.SIGTERM, handler)
    assert stopped.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    return line


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder but the locks, and what is in it."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"]
    return {file: file.read_bytes() for file in files}


def epochs_shown(out: str) -> list[int]:
    """The epochs that a run printed a line of."""
    lines = [line for line in out.splitlines() if line[:4].strip().isdecimal()]
    return [int(line.split("/")[0]) for line in lines]


def newest(folder: Path) -> int:
    """Epochs of the newest state to go on from."""
    states = [torch.load(file, weights_only=True) for file in folder.glob("*.pt")]
    return max((len(state["history"]) for state in states), default=0)


def same_state(saved: dict, other: dict) -> None:
    """Weights, and all that Adam knows, bit for bit."""
    torch.testing.assert_close(saved["model"], other["model"], rtol=0, atol=0)
    mine, theirs = saved["optimizer"]["state"], other["optimizer"]["state"]
    assert mine.keys() == theirs.keys() != set()
    for number in mine:
        torch.testing.assert_close(mine[number], theirs[number], rtol=0, atol=0)
    assert torch.equal(saved["test_correct"], other["test_correct"])
    for row, expected in zip(saved["history"], other["history"], strict=True):
        assert [row[name] for name in LOSSES] == [expected[name] for name in LOSSES]


def same(one: Path, two: Path, *lengths: int) -> None:
    """Two folders of one run hold the same, but for the seconds."""
    assert names(one) == names(two) == {"history.csv", *(f"epoch{n}.pt" for n in lengths)}
    assert history(one, *LOSSES) == history(two, *LOSSES)
    for epochs in lengths:
        same_state(checkpoint(one, epochs), checkpoint(two, epochs))


# ---------------------------------------------------------------- killed


def train_apart(flags: list[str], rarely: float) -> None:
    """train.py in a process of its own, on few test pictures."""
    runs.CHECKPOINT_INTERVAL, runs.CHECKPOINT_SECONDS = rarely, rarely / 20
    datasets.DRAWN["test"] = 60
    train.main(flags)


def test_killed_at_any_moment_and_resumed_it_ends_as_if_nothing_had_been(tmp_path, pytestconfig):
    """In the fill, in the middle of an epoch, while writing: the moments are random, the seed is
    printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])  # the processes start with their imports made

    def start(out: str, rarely: float = 20) -> multiprocessing.Process:
        flags = [*QUICK, "--unfreeze", "layer4", "--epochs", "2", "4", "--cache", "disk"]
        flags += ["--resume", "--out", str(tmp_path / out)]
        process = context.Process(target=train_apart, args=(flags, rarely))
        process.start()
        return process

    began = time.monotonic()
    start("whole", rarely=0).join()
    needed = time.monotonic() - began
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    print("seed", seed)
    kills = 0
    while kills < pytestconfig.getoption("kills"):
        process = start("killed", moments.choice([0, 20]))
        process.join(moments.uniform(0, 0.5 * needed))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:  # all done before all kills were: once more
            shutil.rmtree(tmp_path / "killed")
        kills += process.exitcode != 0
    for _ in range(2):  # the second finds nothing to do
        process = start("killed")
        process.join()
        assert process.exitcode == 0
    (folder,) = (tmp_path / "whole").glob("synthetic*")
    same(folder, tmp_path / "killed" / folder.name, 2, 4)


def stop_in_epoch(monkeypatch, number: int) -> None:
    """As Ctrl-C does, when the epoch has trained and before anything of it is kept."""
    score, calls = train.score_epoch, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == number:
            monkeypatch.setattr(train, "score_epoch", score)
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(train, "score_epoch", stopping)


def run_and_stop(run, monkeypatch, number: int, *flags: str) -> None:
    stop_in_epoch(monkeypatch, number)
    with pytest.raises(KeyboardInterrupt):
        run(*flags)


@pytest.mark.parametrize(
    "unfreeze, lengths", [([], [4]), pytest.param(["layer4"], [3, 4], marks=pytest.mark.slow)]
)
def test_stopped_in_the_middle_it_goes_on_after_its_last_epoch(
    run, monkeypatch, capsys, every_epoch, unfreeze, lengths
):
    flags = ["--image-size", "32", "--unfreeze", *unfreeze, "--epochs", *map(str, lengths)]
    whole = run(*flags)
    flags += ["--resume", "--out", str(whole.parent.with_name("stopped"))]
    for stop in (3, 1):  # in its third epoch, and then in the first one of those that are left
        run_and_stop(run, monkeypatch, stop, *flags)
    capsys.readouterr()
    resumed = run(*flags)
    assert epochs_shown(capsys.readouterr().out) == [3, 4]
    same(whole, resumed, *lengths)
    rates = [f"{stage}_lr" for stage in [*unfreeze, "fc"]]
    assert history(resumed, *rates) == history(whole, *rates)


def test_where_writing_is_slow_it_writes_seldom_and_goes_on_from_what_there_is(
    run, monkeypatch, capsys
):
    flags = ["--image-size", "32", "--epochs", "4"]
    whole = run(*flags)
    flags += ["--resume", "--out", str(whole.parent.with_name("stopped"))]
    monkeypatch.setattr(runs, "CHECKPOINT_INTERVAL", 10**9)
    run_and_stop(run, monkeypatch, 4, *flags)
    folder = whole.parent.with_name("stopped") / whole.name
    assert names(folder) == {"history.csv", "latest.pt"}
    assert newest(folder) == 1 and len(history(folder, "epoch")) == 3
    capsys.readouterr()
    run(*flags)
    assert epochs_shown(capsys.readouterr().out) == [2, 3, 4]
    same(whole, folder, 4)


@pytest.mark.parametrize("resuming", [["--resume"], pytest.param([], marks=pytest.mark.slow)])
def test_killed_before_it_removes_the_state_between_the_next_run_removes_it(
    run, monkeypatch, every_epoch, resuming
):
    flags = ["--image-size", "32", "--epochs", "2"]
    whole = run(*flags)
    flags += ["--out", str(whole.parent.with_name("killed"))]
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == "latest.pt":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        run(*flags)
    folder = whole.parent.with_name("killed") / whole.name
    assert "latest.pt" in names(folder)
    run(*flags, *resuming)
    same(whole, folder, 2)


@pytest.mark.parametrize(
    "lacking, trained",
    [([1], [1]), ([3], [2, 3]), ([1, 3], [1, 2, 3]), ([], [])],
)
def test_only_what_is_missing_is_run(run, capsys, lacking, trained):
    folder = run("--image-size", "32", "--epochs", "1", "3")
    kept = [folder / f"epoch{n}.pt" for n in (1, 3) if n not in lacking]
    before = {file: file.stat().st_mtime_ns for file in kept}
    expected = {n: checkpoint(folder, n) for n in (1, 3)}
    for epochs in lacking:
        (folder / f"epoch{epochs}.pt").unlink()
    (folder / "history.csv").unlink()  # killed between its last two files
    (folder / ".history.csv.123.part").touch()
    capsys.readouterr()
    flags = ["--image-size", "32", "--epochs", "1", "3", "--resume"]
    run(*flags, "--out", str(folder.parent))
    out = capsys.readouterr().out
    assert names(folder) == {"history.csv", "epoch1.pt", "epoch3.pt"}
    assert len(history(folder, "epoch")) == 3
    assert epochs_shown(out) == trained
    assert (f"{folder}: finished" in out) == (not lacking)
    assert {file: file.stat().st_mtime_ns for file in kept} == before
    for epochs in (1, 3):
        same_state(checkpoint(folder, epochs), expected[epochs])


def test_where_nothing_is_there_to_go_on_from_the_nearest_run_is_named(run, capsys):
    """A rate that was mistyped begins from nothing, beside hours of work."""
    few = "--train-size", "20", "--epochs", "1", "--image-size", "32"
    folder = run("--unfreeze", "layer4", *few)
    other = run("--unfreeze", "layer4", *few, "--batch-size", "10", "--out", str(folder.parent))
    again = "--out", str(folder.parent), "--resume", *few
    capsys.readouterr()
    run("--unfreeze", "layer4", "--lr", "fc=1e-4", *again)
    said = f"the nearest run, {folder} differs in learning_rates\n"
    assert said in capsys.readouterr().out
    run("--unfreeze", "layer4", "--batch-size", "10", "--seed", "1", *again)
    run("--unfreeze", "layer3", *again)
    run("--unfreeze", "layer4", "--batch-size", "10", *again)
    out = capsys.readouterr().out
    assert "nearest" not in out and f"{other}: finished" in out


@pytest.mark.parametrize("more", [["1", "2"], pytest.param(["2"], marks=pytest.mark.slow)])
def test_a_short_run_goes_on_to_a_longer_one(run, capsys, more):
    flags = ["--image-size", "32", "--unfreeze", "layer4", "--epochs"]
    long = run(*flags, "1", "2")
    folder = run(*flags, "1")
    short = (folder / "epoch1.pt").read_bytes()
    capsys.readouterr()
    run(*flags, *more, "--resume", "--out", str(folder.parent))
    out = capsys.readouterr().out
    assert "resumed  after epoch 1" in out and epochs_shown(out) == [2]
    same(long, folder, 1, 2)
    assert (folder / "epoch1.pt").read_bytes() == short
    assert checkpoint(folder, 2)["seconds"] > checkpoint(folder, 1)["seconds"]


@pytest.mark.parametrize("resuming", [["--resume"], []])
def test_a_shorter_run_never_takes_away_what_a_longer_one_left(run, resuming):
    flags = ["--image-size", "32", "--epochs"]
    alone = run(*flags, "1")
    folder = run(*flags, "3")
    long = contents(folder)
    run(*flags, "1", *resuming, "--out", str(folder.parent))
    after = contents(folder)
    assert after.keys() == {*long, folder / "epoch1.pt"}
    assert {file: after[file] for file in long} == long
    same_state(checkpoint(folder, 1), checkpoint(alone, 1))


@pytest.mark.parametrize("stopped, expected", [(2, [2, 2, 2, 3]), (3, [3, 3, 3, 3])])
def test_a_shorter_length_asked_for_later_does_not_take_a_stopped_run_back(
    run, monkeypatch, every_epoch, stopped, expected
):
    flags = ["--image-size", "32", "--epochs"]
    whole = run(*flags, "2", "4")
    out = ["--out", str(whole.parent.with_name("stopped"))]
    run_and_stop(run, monkeypatch, stopped + 1, *flags, "4", *out)
    folder = whole.parent.with_name("stopped") / whole.name
    seen, rows, score = [], [], train.score_epoch

    def looking(*arguments):
        seen.append(newest(folder))
        rows.append(len(history(folder, "epoch")))
        return score(*arguments)

    monkeypatch.setattr(train, "score_epoch", looking)
    run(*flags, "2", "4", "--resume", *out)
    assert seen == rows == expected
    same(whole, folder, 2, 4)


def test_a_stopped_long_run_keeps_its_state_while_a_shorter_one_is_run(
    run, monkeypatch, every_epoch
):
    flags = ["--image-size", "32", "--epochs"]
    whole = run(*flags, "2", "5")
    out = ["--out", str(whole.parent.with_name("stopped"))]
    run_and_stop(run, monkeypatch, 4, *flags, "5", *out)
    folder = whole.parent.with_name("stopped") / whole.name
    before = contents(folder)
    for resuming in (["--resume"], []):
        run(*flags, "2", *resuming, *out)
        after = contents(folder)
        assert {file: after[file] for file in before} == before
    run(*flags, "5", "--resume", *out)
    same(whole, folder, 2, 5)


# ---------------------------------------------------------------- the same run, or another


def test_the_same_run_in_other_words_is_the_same_run(run, tmp_path):
    first, second = tmp_path / "start.pth", tmp_path / "moved" / "start.pth"
    second.parent.mkdir()
    torch.save(freeze.build("resnet18", 10, seed=1).state_dict(), first)
    flags = ["--unfreeze", "layer3", "layer4", "--lr", "layer3=3e-5", "fc=0.01"]
    folder = run(*flags, "--epochs", "1", "--weights", str(first))
    before = contents(folder.parent)
    times = {file: file.stat().st_mtime_ns for file in folder.glob("*.pt")}
    first.rename(second)
    flags = ["--unfreeze", "layer4", "fc", "layer3", "--lr", "fc=1e-2", "layer3=0.00003"]
    flags += ["--weights", str(second), "--cache", "off", "--data-dir", str(tmp_path)]
    flags += ["--epochs", "1"]
    if not torch.cuda.is_available():
        flags += ["--device", "auto"]
    run(*flags, "--resume", "--out", str(folder.parent))
    assert contents(folder.parent) == before
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*.pt")} == times


@pytest.fixture
def refused(run, capsys, tmp_path):
    """refused(culprit, *flags): as another run than the one that is there, which stays."""
    weights = tmp_path / "start.pth"
    torch.save(freeze.build("resnet18", 10, seed=1).state_dict(), weights)
    flags = ["--image-size", "32", "--unfreeze", "layer4", "--weights", str(weights)]
    flags += ["--epochs", "1"]
    folder = run(*flags)
    files = contents(folder.parent)

    def refused(culprit: str, *more: str) -> None:
        words = [*SMALL, *flags, *more, "--out", folder.parent]
        line = complaint(train.main, words, capsys)
        assert f"{folder}/epoch1.pt was trained with {culprit}" in line
        assert contents(folder.parent) == files

    return refused


@pytest.mark.parametrize("resuming", [["--resume"], pytest.param([], marks=pytest.mark.slow)])
def test_another_run_of_the_same_name_is_not_resumed_nor_replaced(
    refused, monkeypatch, tmp_path, resuming
):
    """What the folder's name does not tell: the table of rates, a picture, a label, the name of
    a class, the initial weights."""
    with monkeypatch.context() as patch:
        patch.setitem(freeze.LEARNING_RATES, "layer4", 3e-4)
        rates = "learning_rates fc=0.001 layer4=0.0001, not fc=0.001 layer4=0.0003"
        refused(rates, *resuming)
    load = datasets.synthetic

    def refused_with(split: str, culprit: str, **parts) -> None:
        def another(asked: str):
            images = load(asked)
            if asked == split:
                images = images._replace(**parts)
            return images

        with monkeypatch.context() as patch:
            patch.setattr(datasets, "synthetic", another)
            refused(culprit, *resuming)

    train_images, test_images = load("train"), load("test")
    pixels = test_images.pixels.clone()
    pixels[-1, -1, -1, -1] ^= 1
    refused_with("test", "other test pictures", pixels=pixels)
    refused_with("train", "other training pictures", pixels=train_images.pixels ^ 1)
    refused_with("test", "other test pictures", labels=test_images.labels.roll(1))
    refused_with("train", "classes ", classes=("other", *train_images.classes[1:]))
    torch.save(freeze.build("resnet18", 10, seed=2).state_dict(), tmp_path / "start.pth")
    refused("other initial weights", *resuming)
    refused("other initial weights", "--epochs", "1", "2", *resuming)


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def damage(file: Path, kind: str, trap: Path) -> None:
    saved = torch.load(file, weights_only=True)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "text":
        file.write_bytes(b"hello")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "malicious":
        torch.save({"history": Malicious(trap)}, file)
    elif kind == "weights alone":
        torch.save(saved["model"], file)
    elif kind == "tensor":
        torch.save(torch.zeros(3), file)
    elif kind == "old form":
        torch.save({"arguments": {"epochs": 2}, "classes": ["cat"], "stages": ["fc"]}, file)


KINDS = ["truncated", "text", "empty", "malicious", "weights alone", "tensor", "old form"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_whole_checkpoint_is_said_and_left_alone(run, capsys, tmp_path, kind):
    folder = run("--image-size", "32", "--epochs", "1")
    file, trap = folder / "epoch1.pt", tmp_path / "ran"
    damage(file, kind, trap)
    left = contents(folder)
    again = [*QUICK, "--epochs", "1", "--out", folder.parent]
    for main, flags in (
        (train.main, [*again, "--resume"]),
        (train.main, again),
        (evaluate.main, [file]),
        (compare.main, [file]),
    ):
        line = complaint(main, flags, capsys)
        assert str(file) in line
        assert ("earlier version" in line) == (kind == "old form")
        assert contents(folder) == left and not trap.exists()


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(run, monkeypatch, capsys):
    file = run("--epochs", "1") / "epoch1.pt"

    def failing(error: Exception) -> None:
        def load(*_, **__):
            raise error

        monkeypatch.setattr(torch, "load", load)

    failing(PermissionError(errno.EACCES, "Permission denied"))
    line = complaint(evaluate.main, [file], capsys)
    assert f"cannot read {file}" in line and "Permission denied" in line
    failing(MemoryError())
    with pytest.raises(MemoryError):
        evaluate.main([str(file)])


# ---------------------------------------------------------------- stopped, doubled


@pytest.mark.parametrize(
    "number, status",
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_run_that_is_told_to_stop_says_how_to_go_on(tmp_path, number, status):
    process = start_script("train.py", *QUICK, "--epochs", "1000", "--out", str(tmp_path))
    while not process.stdout.readline().startswith("   1/1000"):
        assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    (line,) = error.splitlines()
    assert line.startswith("train.py: stopped") and "--resume" in line
    assert process.returncode == status
    (folder,) = tmp_path.glob("synthetic*")
    assert names(folder) == {"history.csv", "latest.pt"}
    saved = torch.load(folder / "latest.pt", weights_only=True)["history"]
    rows = history(folder, *LOSSES)
    assert len(rows) >= 1 and 1 <= len(saved) <= len(rows)
    assert [[row[name] for name in LOSSES] for row in saved] == rows[: len(saved)]


def test_the_second_of_two_runs_into_one_folder_stops(run, capsys):
    folder = run("--image-size", "32", "--epochs", "1")
    before = contents(folder.parent)
    with locked(folder.parent, folder.name):
        for epochs in (["1"], ["1", "2"]):
            for resuming in (["--resume"], []):
                flags = [*QUICK, "--epochs", *epochs, *resuming, "--out", folder.parent]
                line = complaint(train.main, flags, capsys)
                assert f"another run is writing to {folder}" in line
                assert contents(folder.parent) == before
    (folder / ".epoch1.pt.123.part").touch()  # what it was writing when it was killed
    run("--image-size", "32", "--epochs", "1", "--out", str(folder.parent))
    assert names(folder) == {"history.csv", "epoch1.pt"}


def test_a_run_holds_its_lock_until_its_end(monkeypatch, tmp_path, capsys):
    """And a failed one lets go, too."""
    score, lines = train.score_epoch, []
    flags = [*QUICK, "--epochs", "1", "--out", str(tmp_path / "out")]

    def second(*arguments):
        monkeypatch.setattr(train, "score_epoch", score)
        lines.append(complaint(train.main, flags, capsys))
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(train, "score_epoch", second)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        train.main(flags)
    (line,) = lines
    assert "another run is writing" in line
    train.main(flags)


def hold(out: Path, ready) -> None:
    with locked(out, "run"):
        ready.set()
        time.sleep(600)


def test_a_lock_dies_with_its_process(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match="another run is writing"), locked(tmp_path, "run"):
        pass
    with locked(tmp_path, "another run"):
        pass
    holder.kill()
    holder.join()
    with locked(tmp_path, "run"):
        pass


def test_a_lock_makes_no_folder_of_the_run(tmp_path):
    out = tmp_path / "not/yet"
    with locked(out, "run"):
        with pytest.raises(UserError, match="another run is writing"), locked(out, "run"):
            pass
        assert names(out) == {".locks"}
    assert names(out) == {".locks"}


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    expected = f"{tmp_path} .No locks available.*local disk"
    with pytest.raises(UserError, match=expected), locked(tmp_path, "new"):
        pass
    assert names(tmp_path) == {".locks"}


# ---------------------------------------------------------------- starved, diverging


@pytest.mark.parametrize(
    "flags, file", [(["--epochs", "1"], "epoch1.pt"), (["--epochs", "3", "--resume"], "latest.pt")]
)
def test_a_full_disk_keeps_the_last_state_and_says_so(run, capsys, every_epoch, flags, file):
    folder = run("--image-size", "32", "--epochs", "1")
    before = contents(folder)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does by itself when it starts
    flags = [*QUICK, *flags, "--out", str(folder.parent)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        line = last_line(lambda: train.main(flags), 1, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert f"cannot write {folder}/{file} (File too large): what was there before is kept" in line
    assert contents(folder) == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_epoch(run, monkeypatch):
    high = "not finite in epoch 1 with --lr fc=1e.36 layer4=0.0001: try lower rates$"
    with pytest.raises(FloatingPointError, match=high):
        run("--image-size", "32", "--unfreeze", "layer4", "--lr", "fc=1e36")
    flags = ["--image-size", "32", "--unfreeze", "layer4", "--lr", "layer4=0.5", "--epochs"]
    folder = run(*flags, "1")
    before = (folder / "epoch1.pt").read_bytes()
    losses = iter([float("nan"), 1.0, float("nan")])

    def scored(*_):
        return {"test_loss": next(losses), "test_accuracy": 0.1}, {"test": torch.zeros(60) > 0}

    monkeypatch.setattr(train, "score_epoch", scored)
    where = "in epoch 2 with --lr fc=0.001 layer4=0.5: try lower rates; .*"
    with pytest.raises(FloatingPointError, match=where + "/run[0-9]+/.* keeps epoch 1$"):
        run(*flags, "1", "3", "--resume", "--out", str(folder.parent))
    assert names(folder) == {"history.csv", "epoch1.pt"}
    assert len(history(folder, "epoch")) == 1
    with pytest.raises(FloatingPointError, match=where + "/new/.* keeps epoch 1$"):
        run(*flags, "3", "--out", str(folder.parent.with_name("new")))
    assert newest(folder.parent.with_name("new") / folder.name) == 1
    assert (folder / "epoch1.pt").read_bytes() == before


# ---------------------------------------------------------------- the user's mistakes, and ours


def caused(error: OSError) -> UserError:
    """What is raised where a file cannot be written."""
    told = UserError("cannot write x")
    told.__cause__ = error
    return told


MEMORY = "error: the memory is full: lower --batch-size"
ENDS = [
    (torch.OutOfMemoryError("CUDA"), 1, MEMORY),
    (MemoryError(), 1, MEMORY),
    (RuntimeError("MPS backend out of memory"), 1, MEMORY),
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), 1, MEMORY),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, MEMORY),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
    (caused(OSError(errno.ENOSPC, "No space left on device")), 1, "error: cannot write x"),
    (caused(OSError(errno.EDQUOT, "Disk quota exceeded")), 1, "error: cannot write x"),
    (caused(PermissionError(errno.EACCES, "Permission denied")), 2, "error: cannot write x"),
    (UserError("name another file"), 2, "error: name another file"),
    (FloatingPointError("not finite"), 1, "error: not finite"),
    (KeyboardInterrupt(), 130, "stopped; so"),
    (KeyboardInterrupt(143), 143, "stopped; so"),
]


@pytest.mark.parametrize("error, status, line", ENDS)
def test_a_script_ends_with_one_line(capsys, error, status, line):
    def main():
        raise error

    assert line in last_line(main, status, capsys)


OURS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("not enough values to unpack"),
    KeyError("layer4"),
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
]


def raises(error: Exception, main) -> None:
    """A command ends with this very error, and no sentence."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(type(error)) as raised:
        command(main, "so", "lower --batch-size")
    signal.signal(signal.SIGTERM, handler)
    assert raised.value is error


@pytest.mark.parametrize("stage", [pytest.param("layer1", marks=pytest.mark.slow), "layer4"])
def test_an_error_inside_the_network_is_a_traceback_and_not_the_user_s_mistake(
    run, monkeypatch, stage
):
    """In the fill, in training, in evaluation and in a comparison."""
    folder = run("--epochs", "1", "--unfreeze", "layer4", "--image-size", "32")
    build = freeze.build

    def broken(*args, **more):
        model = build(*args, **more)
        getattr(model, stage).register_forward_hook(raising)
        return model

    def raising(*_):
        raise error

    monkeypatch.setattr(freeze, "build", broken)
    training = [*QUICK, "--unfreeze", "layer4", "--out", str(folder.parent.with_name("new"))]
    file = str(folder / "epoch1.pt")
    for error in OURS:
        raises(error, lambda: train.main(training))
        raises(error, lambda: evaluate.main([file]))
        raises(error, lambda: representations.main([file]))


def test_an_error_in_the_middle_of_the_fill_is_a_traceback(monkeypatch, tmp_path):
    def compute(self, rows, generator=None):
        if len(rows) > 1:
            raise error
        return computed(self, rows)

    computed = features.Features.compute
    monkeypatch.setattr(features.Features, "compute", compute)
    flags = [*QUICK, "--unfreeze", "layer4", "--out", str(tmp_path), "--cache"]
    for error in OURS[:2]:
        raises(error, lambda: train.main([*flags, "host"]))
        raises(error, lambda: train.main([*flags, "disk"]))
