"""What a killed, stopped, doubled, starved or diverging run leaves, and how it goes on."""

import errno
import fcntl
import functools
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
RESUMING = pytest.mark.parametrize("resuming", [["--resume"], []])


@pytest.fixture
def every_epoch(monkeypatch):
    """A checkpoint after every epoch, not now and then."""
    monkeypatch.setattr(runs, "CHECKPOINT_INTERVAL", 0)
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0)


@pytest.fixture
def quick(run):
    """quick("--epochs", "2", out=folder): a run of 32x32 pictures, beside that run if there is
    one."""

    def quick(*flags: str, out: Path | None = None) -> Path:
        where = []
        if out:
            where = ["--out", str(out.parent)]
        return run("--image-size", "32", *flags, *where)

    return quick


@pytest.fixture
def stopped(quick, monkeypatch):
    """stopped(whole, epoch, *flags): the folder of a run that is stopped by Ctrl-C when that epoch
    has trained and nothing of it is kept."""

    def stopped(whole: Path, number: int, *flags: str) -> Path:
        score, calls = train.score_epoch, []

        def stopping(*arguments):
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt
            return score(*arguments)

        folder = whole.parent.with_name("stopped") / whole.name
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "score_epoch", stopping)
            quick(*flags, out=folder)
        return folder

    return stopped


def last_line(main, status: int, capsys) -> str:
    """What a command prints on stderr as it ends with this status: one line."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        command(main, "so", "lower --batch-size")
    signal.signal(signal.SIGTERM, handler)
    assert ended.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    return line


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file below a folder but the locks: what is in it, and when it was written."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"]
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def epochs_shown(capsys) -> list[int]:
    """The epochs that a run has printed a line of."""
    lines = capsys.readouterr().out.splitlines()
    return [int(line.split("/")[0]) for line in lines if line[:4].strip().isdecimal()]


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


# ---------------------------------------------------------------- killed and stopped


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


@pytest.mark.parametrize(
    "unfreeze, lengths", [([], [4]), pytest.param(["layer4"], [3, 4], marks=pytest.mark.slow)]
)
def test_stopped_in_the_middle_it_goes_on_after_its_last_epoch(
    quick, stopped, capsys, every_epoch, unfreeze, lengths
):
    flags = ["--unfreeze", *unfreeze, "--epochs", *map(str, lengths), "--resume"]
    whole = quick(*flags)
    for stop in (3, 1):  # in its third epoch, and then in the first one of those that are left
        folder = stopped(whole, stop, *flags)
    capsys.readouterr()
    quick(*flags, out=folder)
    assert epochs_shown(capsys) == [3, 4]
    same(whole, folder, *lengths)
    rates = [f"{stage}_lr" for stage in [*unfreeze, "fc"]]
    assert history(folder, *rates) == history(whole, *rates)


def test_where_writing_is_slow_it_writes_seldom_and_goes_on_from_what_there_is(
    quick, stopped, monkeypatch, capsys
):
    whole = quick("--epochs", "4")
    monkeypatch.setattr(runs, "CHECKPOINT_INTERVAL", 10**9)
    folder = stopped(whole, 4, "--epochs", "4")
    assert names(folder) == {"history.csv", "latest.pt"}
    assert newest(folder) == 1 and len(history(folder, "epoch")) == 3
    capsys.readouterr()
    quick("--epochs", "4", "--resume", out=folder)
    assert epochs_shown(capsys) == [2, 3, 4]
    same(whole, folder, 4)


@pytest.mark.parametrize("resuming", [["--resume"], pytest.param([], marks=pytest.mark.slow)])
def test_killed_before_it_removes_the_state_between_the_next_run_removes_it(
    quick, monkeypatch, every_epoch, resuming
):
    whole = quick("--epochs", "2")
    folder = whole.parent.with_name("killed") / whole.name
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == "latest.pt":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        quick("--epochs", "2", out=folder)
    assert "latest.pt" in names(folder)
    quick("--epochs", "2", *resuming, out=folder)
    same(whole, folder, 2)


@pytest.mark.parametrize(
    "lacking, trained",
    [([1], [1]), ([3], [2, 3]), ([1, 3], [1, 2, 3]), ([], [])],
)
def test_only_what_is_missing_is_run(quick, capsys, lacking, trained):
    folder = quick("--epochs", "1", "3")
    expected = {n: checkpoint(folder, n) for n in (1, 3)}
    for epochs in lacking:
        (folder / f"epoch{epochs}.pt").unlink()
    (folder / "history.csv").unlink()  # killed between its last two files
    kept = contents(folder)
    (folder / ".history.csv.123.part").touch()
    capsys.readouterr()
    quick("--epochs", "1", "3", "--resume", out=folder)
    assert epochs_shown(capsys) == trained
    assert names(folder) == {"history.csv", "epoch1.pt", "epoch3.pt"}
    assert len(history(folder, "epoch")) == 3
    assert contents(folder).items() >= kept.items()
    for epochs in (1, 3):
        same_state(checkpoint(folder, epochs), expected[epochs])


# ---------------------------------------------------------------- shorter and longer


@pytest.mark.parametrize("more", [["1", "2"], pytest.param(["2"], marks=pytest.mark.slow)])
def test_a_short_run_goes_on_to_a_longer_one(quick, capsys, more):
    flags = ["--unfreeze", "layer4", "--epochs"]
    long = quick(*flags, "1", "2")
    folder = quick(*flags, "1")
    short = (folder / "epoch1.pt").read_bytes()
    capsys.readouterr()
    quick(*flags, *more, "--resume", out=folder)
    assert epochs_shown(capsys) == [2]
    same(long, folder, 1, 2)
    assert (folder / "epoch1.pt").read_bytes() == short
    assert checkpoint(folder, 2)["seconds"] > checkpoint(folder, 1)["seconds"]


@RESUMING
def test_a_shorter_run_never_takes_away_what_a_longer_one_left(quick, resuming):
    alone = quick("--epochs", "1")
    folder = quick("--epochs", "3")
    long = {file: content for file, (content, _) in contents(folder).items()}
    quick("--epochs", "1", *resuming, out=folder)
    after = {file: content for file, (content, _) in contents(folder).items()}
    assert after.keys() == {*long, folder / "epoch1.pt"}
    assert after.items() >= long.items()
    same_state(checkpoint(folder, 1), checkpoint(alone, 1))


@pytest.mark.parametrize(
    "stop, expected, resuming",
    [(2, [2, 2, 2, 3], ["--resume"]), (3, [3, 3, 3, 3], ["--resume"]), (3, [3, 3, 3, 3], [])],
)
def test_a_shorter_length_asked_for_later_does_not_take_a_stopped_run_back(
    quick, stopped, monkeypatch, every_epoch, stop, expected, resuming
):
    whole = quick("--epochs", "2", "4")
    folder = stopped(whole, stop + 1, "--epochs", "4")
    seen, rows, score = [], [], train.score_epoch

    def looking(*arguments):
        seen.append(newest(folder))
        rows.append(len(history(folder, "epoch")))
        return score(*arguments)

    monkeypatch.setattr(train, "score_epoch", looking)
    quick("--epochs", "2", "4", *resuming, out=folder)
    assert seen == rows == expected
    same(whole, folder, 2, 4)


# ---------------------------------------------------------------- the same run, or another


def test_the_same_run_in_other_words_is_the_same_run(quick, tmp_path):
    first, second = tmp_path / "start.pth", tmp_path / "moved" / "start.pth"
    second.parent.mkdir()
    torch.save(freeze.build("resnet18", 10, seed=1).state_dict(), first)
    flags = ["--unfreeze", "layer3", "layer4", "--lr", "layer3=3e-5", "fc=0.01"]
    folder = quick(*flags, "--epochs", "1", "--weights", str(first))
    before = contents(folder)
    history_before = before.pop(folder / "history.csv")
    first.rename(second)
    flags = ["--unfreeze", "layer4", "fc", "layer3", "--lr", "fc=1e-2", "layer3=0.00003"]
    flags += ["--weights", str(second), "--cache", "off", "--data-dir", str(tmp_path)]
    quick(*flags, "--epochs", "1", "--resume", out=folder)
    after = contents(folder)
    assert after.pop(folder / "history.csv")[0] == history_before[0] and after == before


def test_where_nothing_is_there_to_go_on_from_that_is_said(quick, capsys):
    """A rate that was mistyped begins from nothing, beside hours of work."""
    folder = quick("--epochs", "1")
    quick("--epochs", "1", "--resume", out=folder)
    assert "nothing to go on from" not in capsys.readouterr().out
    quick("--epochs", "1", "--lr", "fc=1e-4", "--resume", out=folder)
    assert f"{folder}-fc=0.0001: there is nothing to go on from" in capsys.readouterr().out


def other_pictures(split: str, **parts):
    """Makes a data set of which these parts are others."""
    images = datasets.synthetic(split)._replace(**parts)
    load = datasets.synthetic
    return lambda asked: images if asked == split else load(asked)


@pytest.mark.parametrize("resuming", [["--resume"], pytest.param([], marks=pytest.mark.slow)])
def test_another_run_of_the_same_name_is_not_resumed_nor_replaced(
    quick, capsys, monkeypatch, tmp_path, resuming
):
    """What the folder's name does not tell: the table of rates, a picture, a label, the name of
    a class, the initial weights."""
    weights = tmp_path / "start.pth"
    torch.save(freeze.build("resnet18", 10, seed=1).state_dict(), weights)
    flags = ["--unfreeze", "layer4", "--weights", str(weights), "--epochs", "1"]
    folder = quick(*flags)
    files = contents(folder)
    train_images, test_images = datasets.synthetic("train"), datasets.synthetic("test")
    pixels, classes = test_images.pixels.clone(), ("other", *train_images.classes[1:])
    pixels[-1, -1, -1, -1] ^= 1
    rows = [
        ("test_data", other_pictures("test", pixels=pixels)),
        ("train_data", other_pictures("train", pixels=train_images.pixels ^ 1)),
        ("test_data", other_pictures("test", labels=test_images.labels.roll(1))),
        ("classes", other_pictures("train", classes=classes)),
        ("learning_rates fc=0.001 layer4=0.0001, not fc=0.001 layer4=0.0003", None),
        ("initial_network", None),
    ]
    for culprit, pictures in rows:
        with monkeypatch.context() as patch:
            if pictures:
                patch.setattr(datasets, "synthetic", pictures)
            if "rates" in culprit:
                patch.setitem(freeze.LEARNING_RATES, "layer4", 3e-4)
            if culprit == "initial_network":
                torch.save(freeze.build("resnet18", 10, seed=2).state_dict(), weights)
            words = [*QUICK, *flags, *resuming, "--out", folder.parent]
            line = complaint(train.main, words, capsys)
        assert f"{folder}/epoch1.pt was trained with {culprit}" in line
        assert contents(folder) == files


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize(
    "kind, said",
    [
        *(("truncated", "is damaged"), ("empty", "is damaged"), ("malicious", "is damaged")),
        *(("weights alone", "--weights "), ("tensor", "is no checkpoint")),
        ("old form", "was written by an earlier version"),
    ],
)
def test_what_is_no_whole_checkpoint_is_said_and_left_alone(quick, capsys, tmp_path, kind, said):
    folder = quick("--epochs", "1")
    file, trap = folder / "epoch1.pt", tmp_path / "ran"
    content = {
        "malicious": {"history": Malicious(trap)},
        "weights alone": torch.load(file, weights_only=True)["model"],
        "tensor": torch.zeros(3),
        "old form": {"arguments": {"epochs": 2}, "classes": ["cat"], "stages": ["fc"]},
    }
    if kind in content:
        torch.save(content[kind], file)
    else:
        file.write_bytes({"truncated": file.read_bytes()[:-100], "empty": b""}[kind])
    left = contents(folder)
    again = [*QUICK, "--epochs", "1", "--out", folder.parent]
    for main, flags in (
        (train.main, [*again, "--resume"]),
        (train.main, again),
        (evaluate.main, [file]),
        (compare.main, [file]),
    ):
        line = complaint(main, flags, capsys)
        assert str(file) in line and said in line
        assert contents(folder) == left and not trap.exists()


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(finished, monkeypatch, capsys):
    file, raised = finished / "epoch1.pt", [PermissionError(13, "Permission denied"), MemoryError()]

    def load(*_, **__):
        raise raised.pop(0)

    monkeypatch.setattr(torch, "load", load)
    line = complaint(evaluate.main, [file], capsys)
    assert f"cannot read {file}" in line and "Permission denied" in line
    with pytest.raises(MemoryError):
        evaluate.main([str(file)])


# ---------------------------------------------------------------- told to stop, doubled


@pytest.mark.parametrize(
    "number, status",
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_run_that_is_told_to_stop_says_how_to_go_on(tmp_path, number, status):
    def hear_ctrl_c() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # even if pytest does not

    words = [sys.executable, "-u", str(ROOT / "train.py"), *QUICK, "--epochs", "1000"]
    words += ["--out", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, text=True, preexec_fn=hear_ctrl_c, **pipes)
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
    assert 1 <= len(saved) <= len(rows)
    assert [[row[name] for name in LOSSES] for row in saved] == rows[: len(saved)]


def test_the_second_of_two_runs_into_one_folder_stops(quick, capsys):
    folder = quick("--epochs", "1")
    before = contents(folder.parent)
    with locked(folder.parent, folder.name):
        for resuming in (["--resume"], []):
            flags = [*QUICK, "--epochs", "1", "2", *resuming, "--out", folder.parent]
            assert f"another run is writing to {folder}" in complaint(train.main, flags, capsys)
            assert contents(folder.parent) == before
    (folder / ".epoch1.pt.123.part").touch()  # what it was writing when it was killed
    quick("--epochs", "1", out=folder)
    assert names(folder) == {"history.csv", "epoch1.pt"}


def test_a_run_holds_its_lock_until_its_end_and_a_failed_one_lets_go(monkeypatch, tmp_path, capsys):
    lines, flags = [], [*QUICK, "--epochs", "1", "--out", str(tmp_path / "out")]

    def second(*_):
        lines.append(complaint(train.main, flags, capsys))
        raise RuntimeError("a mistake of ours")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a mistake of ours"):
        patch.setattr(train, "score_epoch", second)
        train.main(flags)
    assert "another run is writing" in lines[0]
    train.main(flags)


def hold(out: Path, ready) -> None:
    with locked(out, "run"):
        ready.set()
        time.sleep(600)


def test_a_lock_dies_with_its_process_and_makes_no_folder_of_the_run(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ready, out = context.Event(), tmp_path / "not/yet"
    holder = context.Process(target=hold, args=(out, ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match="another run is writing"), locked(out, "run"):
        pass
    with locked(out, "another run"):
        assert names(out) == {".locks"}
    holder.kill()
    holder.join()
    with locked(out, "run"), pytest.raises(UserError, match="another run"), locked(out, "run"):
        pass
    with locked(out, "run"):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    expected = f"{tmp_path}.*No locks available.*local disk"
    with pytest.raises(UserError, match=expected), locked(tmp_path, "new"):
        pass


# ---------------------------------------------------------------- starved, diverging


@pytest.mark.parametrize(
    "flags, file", [(["--epochs", "1"], "epoch1.pt"), (["--epochs", "3", "--resume"], "latest.pt")]
)
def test_a_full_disk_keeps_the_last_state_and_says_so(quick, capsys, every_epoch, flags, file):
    folder = quick("--epochs", "1")
    before = contents(folder)
    words = [*QUICK, *flags, "--out", str(folder.parent)]
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does by itself when it starts
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        line = last_line(lambda: train.main(words), 1, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert f"cannot write {folder}/{file} (File too large): what was there before is kept" in line
    after = contents(folder)
    assert {name: after[name][0] for name in after} == {name: before[name][0] for name in before}


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_epoch(quick, monkeypatch):
    high = "not finite in epoch 1 with --lr fc=1e.36 layer4=0.0001: try lower rates$"
    with pytest.raises(FloatingPointError, match=high):
        quick("--unfreeze", "layer4", "--lr", "fc=1e36")
    folder = quick("--epochs", "1")
    before = (folder / "epoch1.pt").read_bytes()
    losses = iter([float("nan"), 1.0, float("nan")])

    def scored(*_):
        return {"test_loss": next(losses), "test_accuracy": 0.1}, {"test": torch.zeros(60) > 0}

    monkeypatch.setattr(train, "score_epoch", scored)
    new = folder.parent.with_name("new") / folder.name
    for where, flags in ((folder, ["1", "3", "--resume"]), (new, ["3"])):
        said = f"in epoch 2 with --lr fc=0.001: try lower rates; {where} keeps epoch 1$"
        with pytest.raises(FloatingPointError, match=said):
            quick("--epochs", *flags, out=where)
        assert newest(where) == len(history(where, "epoch")) == 1
    assert names(folder) == {"history.csv", "epoch1.pt"}
    assert (folder / "epoch1.pt").read_bytes() == before


# ---------------------------------------------------------------- the user's mistakes, and ours


def caused(number: int) -> UserError:
    """What is raised where a file cannot be written."""
    told = UserError("cannot write x")
    told.__cause__ = OSError(number, "a reason")
    return told


MEMORY = "error: the memory is full: lower --batch-size"


@pytest.mark.parametrize(
    "error, status, line",
    [
        (torch.OutOfMemoryError("CUDA"), 1, MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, MEMORY),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (caused(errno.EDQUOT), 1, "error: cannot write x"),
        (caused(errno.EACCES), 2, "error: cannot write x"),
        (UserError("name another file"), 2, "error: name another file"),
        (FloatingPointError("not finite"), 1, "error: not finite"),
        (KeyboardInterrupt(), 130, "stopped; so"),
        (KeyboardInterrupt(143), 143, "stopped; so"),
    ],
)
def test_a_script_ends_with_one_line(capsys, error, status, line):
    def main():
        raise error

    assert line in last_line(main, status, capsys)


OURS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
]


@pytest.mark.parametrize("stage", ["layer1", "layer4"])
def test_an_error_inside_the_network_is_a_traceback_and_not_the_user_s_mistake(
    quick, monkeypatch, stage
):
    """In the fill, in training, in evaluation and in a comparison."""
    folder = quick("--epochs", "1", "--unfreeze", "layer4")
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
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for error in OURS:
        commands = (train.main, training), (evaluate.main, [file]), (representations.main, [file])
        for main, flags in commands:
            with pytest.raises(type(error)) as raised:
                command(functools.partial(main, flags), "so", "lower --batch-size")
            assert raised.value is error
