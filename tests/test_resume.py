"""What a killed, stopped, doubled, starved or diverging run leaves, and how it goes on."""

import errno
import fcntl
import multiprocessing
import os
import random
import re
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

import data
import evaluate
import features
import freeze
import machine
import runs
import train

LOSSES = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")


def command(script: str, *flags: str, **options) -> subprocess.Popen:
    """A process of its own, in which Ctrl-C works even if this one was started in the background."""
    return subprocess.Popen([sys.executable, "-u", str(ROOT / script), *flags], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **options)


def same(one: Path, two: Path) -> None:
    assert history(one, *LOSSES) == history(two, *LOSSES)
    saved, other = checkpoint(one), checkpoint(two)
    torch.testing.assert_close(saved["model"], other["model"], rtol=0, atol=0)
    assert saved["optimizer"]["state"].keys() == other["optimizer"]["state"].keys() != set()
    for number, state in saved["optimizer"]["state"].items():
        torch.testing.assert_close(state, other["optimizer"]["state"][number], rtol=0, atol=0)


# ---------------------------------------------------------------- killed


def test_killed_at_any_moment_and_resumed_it_ends_as_if_nothing_had_been(tmp_path, pytestconfig):
    """In the fill, in the middle of an epoch, while writing: the moments are random, the seed is printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])  # so that the processes start with their imports made

    def start(out: str) -> multiprocessing.Process:
        flags = [*SMALL, "--image-size", "32", "--unfreeze", "layer4", "--epochs", "2", "6", "--cache", "disk", "--resume",
                 "--out", str(tmp_path / out)]
        process = context.Process(target=train.main, args=(flags,))
        process.start()
        return process

    began = time.monotonic()
    start("whole").join()
    needed = time.monotonic() - began
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    print("seed", seed)
    kills = 0
    while kills < pytestconfig.getoption("kills"):
        process = start("killed")
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
    for folder in (tmp_path / "whole").glob("synthetic*"):
        same(folder, tmp_path / "killed" / folder.name)
        assert {file.name for file in (tmp_path / "killed" / folder.name).iterdir()} == {"history.csv", "checkpoint.pt"}
    assert {file.suffix for file in (tmp_path / "killed" / "features").iterdir()} == {".features"}


def stop_in_epoch(monkeypatch, number: int) -> None:
    """As Ctrl-C does, when the epoch has trained and before anything of it is kept."""
    score, calls = train.score, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == number:
            monkeypatch.setattr(train, "score", score)
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(train, "score", stopping)


@pytest.mark.parametrize("epochs", [["4"], ["3", "4"]])
def test_stopped_in_the_middle_it_goes_on_after_its_last_epoch(run, monkeypatch, capsys, epochs):
    flags = ["--image-size", "32", "--unfreeze", "layer4", "--epochs", *epochs]
    whole = run(*flags)
    for stops in (3, 1):  # in its third epoch, and then in the first one of those that are left
        stop_in_epoch(monkeypatch, stops)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, "--resume", "--out", str(whole.parent.with_name("stopped")))
    capsys.readouterr()
    resumed = run(*flags, "--resume", "--out", str(whole.parent.with_name("stopped")))
    assert [line.split("/")[0].strip() for line in capsys.readouterr().out.splitlines() if line[:4].strip().isdecimal()] == ["3", "4"]
    for number in epochs:
        name = whole.name.replace("e4", f"e{number}")
        same(whole.with_name(name), resumed.with_name(name))
        assert history(resumed.with_name(name), "layer4_drift") == history(whole.with_name(name), "layer4_drift")
        assert {file.name for file in resumed.with_name(name).iterdir()} == {"history.csv", "checkpoint.pt"}


@pytest.mark.parametrize("lacking", ["short", "long", "both"])
def test_only_what_is_missing_is_run(run, capsys, lacking):
    long = run("--epochs", "1", "3")
    short = long.with_name(long.name.replace("e3", "e1"))
    kept = [folder for name, folder in (("short", short), ("long", long)) if lacking not in (name, "both")]
    before = {folder: (folder / "checkpoint.pt").stat().st_mtime_ns for folder in kept}
    expected = checkpoint(long)["model"], checkpoint(short)["model"]
    for folder in {short, long} - set(kept):
        (folder / "checkpoint.pt").unlink()
    for folder in kept:  # killed between its last two files
        (folder / "history.csv").unlink()
        (folder / ".history.csv.123.part").touch()
    capsys.readouterr()
    run("--epochs", "1", "3", "--resume", "--out", str(long.parent))
    assert all(sorted(file.name for file in folder.iterdir()) == ["checkpoint.pt", "history.csv"] for folder in (short, long))
    assert len(history(short, "epoch")) == 1 and len(history(long, "epoch")) == 3
    out = capsys.readouterr().out
    assert [line.split("/")[0].strip() for line in out.splitlines() if line[:4].strip().isdecimal()] == {
        "short": ["1"], "long": ["2", "3"], "both": ["1", "2", "3"]}[lacking]
    assert {folder: (folder / "checkpoint.pt").stat().st_mtime_ns for folder in kept} == before
    assert all(f"{folder}: finished" in out for folder in kept)
    torch.testing.assert_close((checkpoint(long)["model"], checkpoint(short)["model"]), expected, rtol=0, atol=0)


def test_a_short_run_goes_on_to_a_longer_one(run, capsys):
    long = run("--unfreeze", "layer4", "--epochs", "1", "3")
    again = run("--unfreeze", "layer4", "--epochs", "1")
    resumed = run("--unfreeze", "layer4", "--epochs", "1", "3", "--resume", "--out", str(again.parent))
    assert "resumed  after epoch 1" in capsys.readouterr().out
    same(long, resumed)
    assert checkpoint(resumed)["seconds"] > checkpoint(again)["seconds"]


@pytest.mark.parametrize("stopped", [2, 3])
def test_a_shorter_run_does_not_take_a_longer_one_back_and_is_written_too(run, monkeypatch, stopped):
    long = run("--epochs", "4")
    saved = checkpoint(long)
    saved["history"] = saved["history"][:stopped]  # as if stopped there
    torch.save(saved, long / "checkpoint.pt")
    seen, score = [], train.score

    def looking(*arguments):
        seen.append(len(checkpoint(long)["history"]))
        return score(*arguments)

    monkeypatch.setattr(train, "score", looking)
    run("--epochs", "2", "4", "--resume", "--out", str(long.parent))
    assert seen == {2: [2, 2, 2, 3], 3: [3, 3, 3, 3]}[stopped] and len(checkpoint(long)["history"]) == 4
    assert len(checkpoint(long.with_name(long.name.replace("e4", "e2")))["history"]) == 2


def test_the_same_run_in_other_words_is_the_same_run(run, tmp_path):
    first, second = tmp_path / "start.pth", tmp_path / "moved" / "start.pth"
    second.parent.mkdir()
    torch.save(freeze.build(10, seed=1).state_dict(), first)
    flags = ["--unfreeze", "layer3", "layer4", "--lr", "layer3=3e-5", "fc=0.01", "--weights", str(first)]
    folder, before = run(*flags), time.time_ns()
    first.rename(second)
    run("--unfreeze", "layer4", "fc", "layer3", "--lr", "fc=1e-2", "layer3=0.00003", "--weights", str(second), "--device", "auto",
        "--cache", "off", "--data-dir", str(tmp_path), "--resume", "--out", str(folder.parent))
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]
    assert (folder / "checkpoint.pt").stat().st_mtime_ns < before


@pytest.mark.parametrize("resuming", [["--resume"], []])
def test_another_run_of_the_same_name_is_not_resumed_nor_replaced(run, capsys, monkeypatch, tmp_path, resuming):
    """What the folder's name does not tell: the rates' table, a test picture, a label, a class's name, the initial weights."""
    torch.save(freeze.build(10, seed=1).state_dict(), tmp_path / "start.pth")
    flags = ["--unfreeze", "layer4", "--weights", str(tmp_path / "start.pth"), "--epochs", "1"]
    folder = run(*flags)
    files = {file: file.read_bytes() for file in folder.parent.rglob("*.*")}

    def refused(expected: str, *more: str) -> None:
        with pytest.raises(SystemExit, match="2"):
            run(*flags, *more, *resuming, "--out", str(folder.parent))
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{folder}/checkpoint.pt was trained with {expected}" in line
        assert f"go on as it began, use another --out, or delete {folder}" in line
        assert {file: file.read_bytes() for file in folder.parent.rglob("*.*")} == files

    with monkeypatch.context() as patch:
        patch.setitem(freeze.LEARNING_RATES, "layer4", 3e-4)
        refused("--lr layer4=0.0001 fc=0.001, not layer4=0.0003 fc=0.001")
    images = data.synthetic("test")
    for changed, expected in ((images._replace(pixels=images.pixels ^ 1), "train images of sha256 "),
                              (images._replace(labels=images.labels.roll(1)), "train images of sha256 "),
                              (images._replace(classes=("other", *images.classes[1:])), "classes bars, checks, ")):
        with monkeypatch.context() as patch:
            patch.setattr(data, "synthetic", lambda split: changed)
            refused(expected)
    torch.save(freeze.build(10, seed=2).state_dict(), tmp_path / "start.pth")
    refused("weights of sha256 ")
    refused("weights of sha256 ", "--epochs", "1", "2")  # the longer run's folder is not left behind


@pytest.mark.parametrize("damage", ["truncated", "text", "malicious"])
def test_a_damaged_checkpoint_is_not_resumed(run, capsys, tmp_path, damage):
    folder = run("--epochs", "2")
    file = folder / "checkpoint.pt"
    if damage == "malicious":
        torch.save({"history": Malicious(tmp_path / "ran")}, file)
    else:
        file.write_bytes({"truncated": file.read_bytes()[:-100], "text": b"hello"}[damage])
    left = file.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        run("--epochs", "2", "--resume", "--out", str(folder.parent))
    assert f"{file} is not a checkpoint that train.py wrote whole: delete it" in capsys.readouterr().err
    assert file.read_bytes() == left and not (tmp_path / "ran").exists()
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([str(file)])
    assert str(file) in capsys.readouterr().err and not (tmp_path / "ran").exists()


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


# ---------------------------------------------------------------- stopped, doubled


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_told_to_stop_says_how_to_go_on(tmp_path, number, status):
    process = command("train.py", *SMALL, "--image-size", "32", "--epochs", "1000", "--out", str(tmp_path))
    while not process.stdout.readline().startswith("   2/1000"):
        assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert error == "train.py: stopped; to go on after the last finished epoch, run the same command with --resume\n"
    assert process.returncode == status
    (folder,) = tmp_path.iterdir()
    assert len(history(folder, "epoch")) == len(checkpoint(folder)["history"]) >= 2


def test_the_second_of_two_runs_into_one_directory_stops_and_the_lock_dies_with_the_first(run, capsys):
    folder = run("--epochs", "1")
    before = (folder / "checkpoint.pt").read_bytes()
    holder = os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT)
    fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for epochs in (["1"], ["1", "2"]):
        with pytest.raises(SystemExit, match="2"):
            run("--epochs", *epochs, "--out", str(folder.parent))
        assert f"another run is writing to {folder}: wait for its end" in capsys.readouterr().err
        assert (folder / "checkpoint.pt").read_bytes() == before and [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / ".lock").exists()
    os.close(holder)
    (folder / ".checkpoint.pt.123.part").touch()  # what it was writing when it was killed
    run("--epochs", "1", "--out", str(folder.parent))
    assert sorted(file.name for file in folder.iterdir()) == ["checkpoint.pt", "history.csv"]


def test_a_run_holds_its_lock_and_takes_away_what_it_made_and_left_empty(tmp_path):
    (tmp_path / "there").mkdir()
    folder = tmp_path / "there/not/yet"
    with runs.locked(folder):
        with pytest.raises(OSError, match="another run is writing"), runs.locked(folder):
            pass
        assert (folder / ".lock").exists()
    assert (tmp_path / "there").exists() and not (tmp_path / "there/not").exists()
    with runs.locked(folder):
        (folder / "file").touch()
    assert [file.name for file in folder.iterdir()] == ["file"]


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(OSError, match="cannot lock .*/new .No locks available.: choose an --out on a local disk"), runs.locked(tmp_path / "new"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_its_holder_has_just_removed_holds_nobody_off_and_lets_nobody_in(tmp_path, monkeypatch):
    """Between opening the file and locking it, the run before unlinked it: the lock would be one that nobody else sees."""
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, _: (tmp_path / ".lock").unlink())
    with pytest.raises(OSError, match="another run is writing"), runs.locked(tmp_path):
        pass


# ---------------------------------------------------------------- starved, diverging


def test_a_full_disk_keeps_the_last_state_and_says_so(run):
    folder = run("--epochs", "1")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does by itself when it starts
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        with pytest.raises(OSError) as full:
            run("--epochs", "1", "--out", str(folder.parent))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert str(full.value) == f"cannot write {folder}/checkpoint.pt (File too large): what was there before is kept"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_epoch(run, monkeypatch):
    folder = run("--epochs", "1", "--unfreeze", "layer4", "--lr", "layer4=0.5")
    with pytest.raises(FloatingPointError, match="not finite in epoch 1 with --lr layer4=0.0001 fc=1e.36: try lower rates$"):
        run("--epochs", "1", "--unfreeze", "layer4", "--lr", "fc=1e36")
    losses = iter([float("nan"), 1.0, float("nan")])
    monkeypatch.setattr(train, "score", lambda *_: (next(losses), 0.1))
    before, other = (folder / "checkpoint.pt").read_bytes(), ["--unfreeze", "layer4", "--lr", "layer4=0.5", "--out", str(folder.parent)]
    with pytest.raises(FloatingPointError, match="epoch 2 with --lr layer4=0.5 fc=0.001: try lower rates$"):  # e3 has nothing yet
        run("--epochs", "1", "3", *other, "--resume")
    with pytest.raises(FloatingPointError, match=f"epoch 2 with .*: try lower rates; .*{folder.name.replace('e1', 'e3')} keeps epoch 1$"):
        run("--epochs", "3", *other)
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_a_full_disk_in_the_fill(run, monkeypatch, tmp_path):
    def blocks(self):
        yield 0, torch.zeros(2, 2, 2, 256)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features.Features, "blocks", blocks)
    with pytest.raises(OSError, match="cannot write .*/features/[0-9a-f]*.features .No space left on device.: try --cache off"):
        run("--unfreeze", "layer4", "--cache", "disk")
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(run, monkeypatch, capsys):
    folder = run("--epochs", "1")
    for error, expected in ((PermissionError(13, "Permission denied"), "cannot read .*/checkpoint.pt .Permission denied"),):
        monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(error))
        assert re.search(expected, complaint(evaluate.main, [folder / "checkpoint.pt"], capsys))
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        evaluate.main([str(folder / "checkpoint.pt")])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_cache_that_does_not_fit_after_all_goes_to_the_next_place(run, monkeypatch, capsys, error):
    expected = history(run("--unfreeze", "layer4"), *LOSSES)
    fill = features.Features.fill

    def full(self, place, folder):
        if place == "host":
            self.store = torch.empty(1)
            raise error
        return fill(self, place, folder)

    monkeypatch.setattr(features.Features, "fill", full)
    found = history(run("--unfreeze", "layer4"), *LOSSES)
    assert "does not fit after all (--cache host): off" in capsys.readouterr().out
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0.02)


def test_from_the_device_to_the_host_to_nowhere(monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(features, "free_memory", lambda *_: 2**40)

    class Full:
        bytes, store, prefix = 10, None, [None]

        def fill(self, place, folder):
            tried.append(place)
            if place == "device":
                raise torch.OutOfMemoryError
            if place == "host":
                torch.empty(2**60)  # what the CPU's allocator raises is a plain RuntimeError
            return 0

    assert features.fill_all([Full()], "device", torch.device("cpu"), Path("features")) == ("off", 0)
    assert tried == ["device", "host", "off"]


@pytest.mark.parametrize("error, status, line", [
    (torch.OutOfMemoryError("CUDA"), 1, "error: the memory is full: lower --batch-size"), (MemoryError(), 1, "--batch-size"),
    (RuntimeError("MPS backend out of memory"), 1, "--batch-size"), (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), 1, "--batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "error: the memory is full: lower --batch-size"),
    (OSError("cannot write x"), 1, "error: cannot write x"), (FloatingPointError("not finite"), 1, "error: not finite"),
    (KeyboardInterrupt(), 130, "stopped; so"), (KeyboardInterrupt(143), 143, "stopped; so")])
def test_a_script_ends_with_one_line(monkeypatch, capsys, error, status, line):
    def main():
        raise error

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        machine.command(main, "so", "lower --batch-size")
    (said,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == status and line in said
