"""What a killed, stopped, doubled, starved or diverging run leaves, and how it goes on."""

import errno
import fcntl
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, ROOT, SMALL, checkpoint, complaint, history, slow, stopped_in_epoch
from test_weights import Malicious

import compare
import data
import evaluate
import freeze
import train
from data import UserError
from plumbing import datasets
from plumbing import run as runs
from plumbing.files import locked

LOSSES = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
QUICK = (*SMALL, "--image-size", "32", "--train-size", "20", "--batch-size", "8")


@pytest.fixture(autouse=True, scope="module")
def twenty_test_pictures():
    few = data.stratified_subset(datasets.synthetic("test"), 20, 0)
    splits = {"train": datasets.synthetic("train"), "test": few}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "synthetic", splits.get)
        yield


@pytest.fixture(scope="module")
def whole(twenty_test_pictures, tmp_path_factory):
    """The folder of an uninterrupted run with every length from 1 to 4, not to be written to."""
    out = tmp_path_factory.mktemp("whole")
    train.main([*QUICK, "--epochs", "1", "2", "3", "4", "--out", str(out)])
    (file,) = out.glob("*/history.csv")
    return file.parent


@pytest.fixture
def part(whole, tmp_path):
    """part(1, 3): a copy of that folder with the checkpoints of these lengths alone."""

    def part(*lengths: int) -> Path:
        folder = tmp_path / "part" / whole.name
        folder.mkdir(parents=True)
        for epochs in lengths:
            shutil.copy(whole / f"epoch{epochs}.pt", folder)
        table = (whole / "history.csv").read_bytes().splitlines(keepends=True)
        (folder / "history.csv").write_bytes(b"".join(table[: 1 + max(lengths)]))
        return folder

    return part


def quick(*flags: str, out: Path) -> None:
    """A run into a folder of that name, or beside it if the flags give it another one."""
    train.main([*QUICK, *flags, "--out", str(out.parent)])


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


def same(whole: Path, folder: Path, *lengths: int) -> None:
    """A folder holds these lengths, and nothing else than the uninterrupted run does."""
    assert names(folder) == {"history.csv", *(f"epoch{n}.pt" for n in lengths)}
    assert history(folder, *LOSSES) == history(whole, *LOSSES)[: max(lengths)]
    for epochs in lengths:
        same_state(checkpoint(folder, epochs), checkpoint(whole, epochs))


def train_apart(flags: list[str], rarely: float, log: str) -> None:
    """train.py in a process of its own, on few test pictures. What it prints is in log."""
    runs.CHECKPOINT_INTERVAL, runs.CHECKPOINT_SECONDS = rarely, rarely / 20
    datasets.DRAWN["test"] = 20
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if pytest does not
    sys.argv = ["train.py", *flags]
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115  # until it ends
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def test_killed_at_any_moment_and_resumed_it_ends_as_if_nothing_had_been(tmp_path, pytestconfig):
    """In the fill, in the middle of an epoch, while writing: the moments are random, the seed is
    printed."""

    def start(out: str, rarely: float = 20):
        flags = [*QUICK, "--epochs", "1", "3", "--cache", "disk"]
        flags += ["--resume", "--out", str(tmp_path / out)]
        process = CONTEXT.Process(target=train_apart, args=(flags, rarely, os.devnull))
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
    process = start("killed")
    process.join()
    assert process.exitcode == 0
    (folder,) = (tmp_path / "whole").glob("synthetic*")
    same(folder, tmp_path / "killed" / folder.name, 1, 3)


def test_where_writing_is_slow_it_writes_seldom_and_goes_on(whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "stopped" / whole.name
    monkeypatch.setattr(runs, "CHECKPOINT_INTERVAL", 10**9)
    with stopped_in_epoch(4):
        quick("--epochs", "4", out=folder)
    assert names(folder) == {"history.csv", "latest.pt"}
    assert newest(folder) == 1 and len(history(folder, "epoch")) == 3
    capsys.readouterr()
    quick("--epochs", "4", "--resume", out=folder)
    assert epochs_shown(capsys) == [2, 3, 4]
    same(whole, folder, 4)


@pytest.mark.parametrize(
    "there, flags, trained",
    [
        ([1, 3], "1 3 --resume", []),
        ([3], "1 3 --resume", [1]),
        ([1], "1 3 --resume", [2, 3]),
        ([1], "3 --resume", [2, 3]),
        ([3], "1 --resume", [1]),
        ([3], "1", [1]),  # begun anew, it takes nothing away from the longer one
    ],
)
def test_only_what_is_missing_is_run_and_nothing_lost(whole, part, capsys, there, flags, trained):
    """Also where a run was killed before it wrote history.csv, or removed latest.pt, or renamed
    what it wrote."""
    folder = part(*there)
    (folder / "history.csv").unlink()
    kept = contents(folder)
    shutil.copy(whole / "epoch1.pt", folder / "latest.pt")
    (folder / ".history.csv.123.part").touch()
    capsys.readouterr()
    quick("--epochs", *flags.split(), out=folder)
    assert epochs_shown(capsys) == trained
    asked = [int(word) for word in flags.split() if word.isdecimal()]
    same(whole, folder, *{*there, *asked})
    assert contents(folder).items() >= kept.items()
    if trained == [2, 3]:
        assert checkpoint(folder, 3)["seconds"] > checkpoint(folder, 1)["seconds"]


@pytest.mark.parametrize(
    "stop, expected, flags", [(2, [2, 2, 2, 3], ["--resume"]), slow(3, [3, 3, 3, 3], [])]
)
def test_a_shorter_length_takes_no_stopped_run_back(
    whole, tmp_path, monkeypatch, every_epoch, stop, expected, flags
):
    folder = tmp_path / "stopped" / whole.name
    with stopped_in_epoch(stop + 1):
        quick("--epochs", "4", out=folder)
    seen, rows, score = [], [], train.score_epoch

    def looking(*arguments):
        seen.append(newest(folder))
        rows.append(len(history(folder, "epoch")))
        return score(*arguments)

    monkeypatch.setattr(train, "score_epoch", looking)
    quick("--epochs", "2", "4", *flags, out=folder)
    assert seen == rows == expected
    same(whole, folder, 2, 4)


def test_the_same_run_in_other_words_is_the_same_run(run, tmp_path):
    first, second = tmp_path / "start.pth", tmp_path / "moved" / "start.pth"
    second.parent.mkdir()
    torch.save(freeze.build("resnet18", 10, seed=1).state_dict(), first)
    flags = [*QUICK, "--unfreeze", "layer3", "layer4", "--lr", "layer3=3e-5", "fc=0.01"]
    folder = run(*flags, "--epochs", "1", "--weights", str(first))
    before = contents(folder)
    history_before = before.pop(folder / "history.csv")
    first.rename(second)
    flags = ["--unfreeze", "layer4", "fc", "layer3", "--lr", "fc=1e-2", "layer3=0.00003"]
    flags += ["--weights", str(second), "--cache", "off", "--data-dir", str(tmp_path)]
    quick(*flags, "--epochs", "1", "--resume", out=folder)
    after = contents(folder)
    assert after.pop(folder / "history.csv")[0] == history_before[0] and after == before


def test_where_nothing_is_there_to_go_on_from_that_is_said(part, capsys):
    """A rate that was mistyped begins from nothing, beside hours of work."""
    folder = part(1)
    quick("--epochs", "1", "--resume", out=folder)
    assert "nothing to go on from" not in capsys.readouterr().out
    quick("--epochs", "1", "--lr", "fc=1e-4", "--resume", out=folder)
    assert f"{folder}-fc=0.0001: there is nothing to go on from" in capsys.readouterr().out


def test_another_run_of_the_same_name_is_not_resumed_nor_replaced(part, capsys, monkeypatch):
    """What the folder's name does not tell: the table of rates, a picture, a label, the name of
    a class, the initial weights."""
    folder, build = part(1), freeze.build
    files, some, test = contents(folder), datasets.synthetic("train"), datasets.synthetic("test")
    pixels = test.pixels.clone()
    pixels[-1, -1, -1, -1] ^= 1
    changes = [
        ("other test pictures", {"test": test._replace(pixels=pixels)}),
        ("other train pictures", {"train": some._replace(pixels=some.pixels ^ 1)}),
        ("other test pictures", {"test": test._replace(labels=test.labels.roll(1))}),
        ("classes", {"train": some._replace(classes=("other", *some.classes[1:]))}),
        ("learning_rates fc=0.001, not fc=0.003", {}),
        ("other initial weights", {}),
    ]
    for culprit, pictures in changes:
        with monkeypatch.context() as patch:
            patch.setattr(datasets, "synthetic", ({"train": some, "test": test} | pictures).get)
            if "rates" in culprit:
                patch.setitem(freeze.LEARNING_RATES, "fc", 3e-3)
            if culprit == "other initial weights":
                patch.setattr(freeze, "build", lambda *given: build(*given[:2], seed=9))
            words = [*QUICK, "--epochs", "1", "--resume", "--out", folder.parent]
            line = complaint(train.main, words, capsys)
        assert f"{folder}/epoch1.pt was trained with {culprit}" in line
        assert contents(folder) == files


@pytest.mark.parametrize(
    "kind, said",
    [
        *(("truncated", "is damaged"), ("empty", "is damaged"), ("malicious", "is damaged")),
        *(("weights alone", "--weights "), ("tensor", "is no checkpoint")),
        ("old form", "was written by an earlier version"),
    ],
)
def test_what_is_no_checkpoint_is_said_and_left_alone(part, capsys, monkeypatch, kind, said):
    file = part(1) / "epoch1.pt"
    monkeypatch.chdir(file.parent)
    content = {
        "malicious": {"history": Malicious()},
        "weights alone": torch.load(file, weights_only=True)["model"],
        "tensor": torch.zeros(3),
        "old form": {"arguments": {"epochs": 2}, "classes": ["cat"], "stages": ["fc"]},
    }
    if kind in content:
        torch.save(content[kind], file)
    else:
        file.write_bytes({"truncated": file.read_bytes()[:-100], "empty": b""}[kind])
    left = contents(file.parent)
    again = [*QUICK, "--epochs", "1", "--out", file.parents[1]]
    for main, flags in ((train.main, again), (evaluate.main, [file]), (compare.main, [file])):
        line = complaint(main, flags, capsys)
        assert str(file) in line and said in line
        assert contents(file.parent) == left and not Path("ran").exists()


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(finished, monkeypatch, capsys):
    file, raised = finished / "epoch1.pt", [PermissionError(13, "Permission denied"), MemoryError()]

    def load(*_, **__):
        raise raised.pop(0)

    monkeypatch.setattr(torch, "load", load)
    line = complaint(evaluate.main, [file], capsys)
    assert f"cannot read {file}" in line and "Permission denied" in line
    with pytest.raises(MemoryError):
        evaluate.main([str(file)])


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), slow(signal.SIGTERM, 143)])
def test_a_run_that_is_told_to_stop_says_how_to_go_on(tmp_path, number, status):
    log = tmp_path / "log"
    flags = [*QUICK, "--epochs", "1000", "--out", str(tmp_path)]
    process = CONTEXT.Process(target=train_apart, args=(flags, 20, str(log)))
    process.start()
    while not log.exists() or "   1/1000" not in log.read_text():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    *printed, line = log.read_text().splitlines()
    assert line.startswith("train.py: stopped") and "--resume" in line
    assert "Traceback" not in "".join(printed) and process.exitcode == status
    (folder,) = tmp_path.glob("synthetic*")
    assert names(folder) == {"history.csv", "latest.pt"}
    saved = torch.load(folder / "latest.pt", weights_only=True)["history"]
    rows = history(folder, *LOSSES)
    assert 1 <= len(saved) <= len(rows)
    assert [[row[name] for name in LOSSES] for row in saved] == rows[: len(saved)]


def test_a_run_holds_its_lock_until_its_end_and_a_failed_one_lets_go(part, monkeypatch, capsys):
    folder, lines = part(1), []
    before = contents(folder.parent)
    flags = [*QUICK, "--epochs", "1", "--out", str(folder.parent)]

    def second(*_):
        patch.undo()
        lines.append(complaint(train.main, flags, capsys))
        raise RuntimeError("a mistake of ours")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a mistake of ours"):
        patch.setattr(train, "score_epoch", second)
        train.main(flags)
    assert f"another run is writing to {folder}" in lines[0]
    left = contents(folder.parent)
    assert {file: left[file][0] for file in left} == {file: before[file][0] for file in before}
    train.main(flags)


def hold(out: Path, ready) -> None:
    with locked(out, "run"):
        ready.set()
        time.sleep(600)


def test_a_lock_dies_with_its_process_and_makes_no_folder_of_the_run(tmp_path):
    ready, out = CONTEXT.Event(), tmp_path / "not/yet"
    holder = CONTEXT.Process(target=hold, args=(out, ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match="another run is writing"), locked(out, "run"):
        pass
    with locked(out, "another run"):
        assert names(out) == {".locks"}
    holder.kill()
    holder.join()
    with locked(out, "run"):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    expected = f"{tmp_path}.*No locks available.*local disk"
    with pytest.raises(UserError, match=expected), locked(tmp_path, "new"):
        pass


@pytest.mark.parametrize("flags, file", [("1", "epoch1.pt"), ("3 --resume", "latest.pt")])
def test_a_full_disk_keeps_the_last_state_and_says_so(part, capsys, every_epoch, flags, file):
    folder = part(1)
    before = contents(folder)
    words = [*QUICK, "--epochs", *flags.split(), "--out", folder.parent]
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does by itself when it starts
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        line = complaint(train.main, words, capsys, status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert f"cannot write {folder}/{file} (File too large): what was there before is kept" in line
    after = contents(folder)
    assert {name: after[name][0] for name in after} == {name: before[name][0] for name in before}


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_epoch(part, monkeypatch):
    folder = part(1)
    new = folder.parent.with_name("new") / folder.name
    with pytest.raises(FloatingPointError, match="epoch 1 with --lr fc=1e.36: try lower rates$"):
        quick("--lr", "fc=1e36", out=new)
    before = (folder / "epoch1.pt").read_bytes()
    losses = iter([float("nan"), 1.0, float("nan")])

    def scored(*_):
        return {"test_loss": next(losses), "test_accuracy": 0.1}, {"test": torch.zeros(20) > 0}

    monkeypatch.setattr(train, "score_epoch", scored)
    for where, flags in ((folder, ["1", "3", "--resume"]), (new, ["3"])):
        said = f"in epoch 2 with --lr fc=0.001: try lower rates; {where} keeps epoch 1$"
        with pytest.raises(FloatingPointError, match=said):
            quick("--epochs", *flags, out=where)
        assert newest(where) == len(history(where, "epoch")) == 1
    assert names(folder) == {"history.csv", "epoch1.pt"}
    assert (folder / "epoch1.pt").read_bytes() == before
