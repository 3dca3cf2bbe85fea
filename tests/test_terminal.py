"""The line that shows progress, and what is told of a run."""

import pytest
import torch

import freeze
from data import Images
from plumbing import terminal


def on_a_terminal(monkeypatch) -> None:
    """What is printed from here on goes to a terminal."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(terminal, "last_shown", 0.0)


@pytest.mark.parametrize("columns", ["0", "40", "200"])
def test_progress_fits_the_terminal_and_is_wiped(monkeypatch, capsys, columns):
    on_a_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", columns)
    terminal.progress("a long line, " * 20)
    terminal.progress()
    shown = capsys.readouterr().out.split("\r")
    assert max(map(len, shown)) < (int(columns) or 81)
    assert shown[1].startswith("a long line") and not shown[-2].strip()


def test_progress_is_shown_ten_times_a_second_at_most(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    for number in range(10):
        terminal.progress(f"picture {number}")
        now[0] += 0.03
    shown = capsys.readouterr().out.split("\r")
    assert [line.strip() for line in shown[1:]] == ["picture 0", "picture 4", "picture 8"]


def test_nothing_of_it_reaches_a_file_within_a_minute(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "last_shown", terminal.time.monotonic())
    terminal.progress("a line")
    terminal.reporter("filling")(1, 2)
    terminal.progress()
    assert capsys.readouterr().out == ""


def test_without_a_terminal_there_is_a_whole_line_a_minute(monkeypatch, capsys):
    """As with nohup, in a batch system, or behind a notebook's exclamation mark."""
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(terminal, "last_shown", now[0])
    report = terminal.reporter("epoch 3, step")
    for step in range(1, 26):
        now[0] += 10
        report(step, 100)
    out = capsys.readouterr().out
    steps = [line.split(" of ")[0] for line in out.splitlines()]
    assert steps == [f"epoch 3, step: {step}" for step in (6, 12, 18, 24)]
    assert "\r" not in out


def test_what_is_printed_in_between_starts_the_minute_anew(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(terminal, "last_shown", now[0])
    now[0] += 50
    terminal.progress()
    now[0] += 50
    terminal.progress("too early")
    now[0] += 10
    terminal.progress("a minute later")
    assert capsys.readouterr().out == "a minute later\n"


# ---------------------------------------------------------------- what is told of the pictures


def told(capsys, classes: list[str], counts: list[int]) -> list[str]:
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    pixels = torch.zeros(len(labels), 2, 2, 3, dtype=torch.uint8)
    train = Images(pixels, labels, tuple(classes))
    terminal.print_data(train, Images(pixels[:3], labels[:3], train.classes))
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_the_classes_and_the_smallest_and_largest_are_told(capsys):
    lines = told(capsys, ["cat", "dog", "fox"], [7, 2000, 5])
    assert lines[0] == "data     2,012 train and 3 test images"
    assert " ".join(lines[1:]) == "3 classes: cat, dog, fox; from 5 of fox to 2,000 of dog"


def test_classes_of_one_size_are_only_named(capsys):
    assert told(capsys, ["cat", "dog"], [7, 7])[1:] == ["2 classes: cat, dog"]


def test_of_many_classes_ten_are_named(capsys):
    names = [f"class{number}" for number in range(12)]
    text = " ".join(told(capsys, names, [1] * 12)[1:])
    assert text == f"12 classes: {', '.join(names[:10])} and 2 more"
    text = " ".join(told(capsys, names[:10], [1] * 10)[1:])
    assert text == f"10 classes: {', '.join(names[:10])}"


def test_a_reporter_says_how_far_how_fast_and_how_long_still(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    report = terminal.reporter("filling")
    now[0] += 60
    report(6000, 18000)
    assert capsys.readouterr().out.strip() == "filling: 6,000 of 18,000, 100 a second, 2 min left"


@pytest.mark.parametrize("mistake", [False, True])
def test_every_stage_is_told_with_its_rate_or_as_frozen(capsys, mistake):
    model = freeze.build("resnet18", 10)
    terminal.print_stages(model, {"layer4": 1e-4, "fc": 1e-3}, mistake)
    _, *lines = capsys.readouterr().out.splitlines()
    told = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines}
    frozen = {False: "frozen", True: "frozen, BatchNorm in train mode"}[mistake]
    assert list(told) == list(freeze.STAGES)
    assert told["layer4"] == ["8,393,728", "learns at 0.0001"]
    assert told["fc"] == ["5,130", "learns at 0.001"]
    assert told["stem"] == ["9,536", frozen] and told["layer3"][1] == frozen


def test_what_is_watched_comes_through_as_it_is(monkeypatch):
    shown = []
    monkeypatch.setattr(terminal, "progress", shown.append)
    assert list(terminal.watched(["one", "two"], "epoch 3: testing")) == ["one", "two"]
    assert shown == ["epoch 3: testing, batch 1", "epoch 3: testing, batch 2"]
