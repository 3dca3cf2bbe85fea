"""The line that shows progress, and what is told of a run."""

import pytest

import freeze
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


def test_nothing_of_it_reaches_a_file(capsys):
    terminal.progress("a line")
    terminal.reporter("filling")(1, 2)
    terminal.progress()
    assert capsys.readouterr().out == ""


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
