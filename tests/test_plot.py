"""The pictures: what is drawn is what stands in the CSV files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, complaint
from PIL import Image

import plot
from plumbing.files import write_rows

RATES = {"fc": "fc=0.001", "fc+layer4": "fc=0.001 layer4=0.0001"}
RATES["fc+layer3+layer4"] = "fc=0.001 layer3=1e-05 layer4=0.0001"


def accuracy(strategy: str, epoch: int, seed: float, size: int) -> float:
    return 0.7 + 0.05 * len(strategy) / 10 + 0.001 * epoch + 0.01 * seed + size * 1e-6


class Study:
    """A folder of made-up runs."""

    def __init__(self, folder: Path):
        self.folder, self.summary = folder, []

    def add(self, strategy: str, *lengths: int, size=1000, seed=0, split="test", **other) -> None:
        """One run, with a row of the summary for each of its lengths."""
        name = "-".join([strategy, str(seed), str(size), split, *map(str, other.values())])
        run = {"run": name, "strategy": strategy, "seed": seed, "train_images": size}
        run |= {"dataset": "cifar10", "model": "resnet18", "weights": "imagenet"}
        run |= {"precision": "bf16", "image_size": 224, "batch_size": 128, "test_images": 400}
        run |= {"learning_rates": RATES[strategy], "frozen_batchnorm": "eval"} | other
        history = []
        for epoch in range(1, max(lengths) + 1):
            right = accuracy(strategy, epoch, seed, size)
            row = {"epoch": epoch, "train_loss": 1 / epoch, "train_accuracy": 0.9}
            row |= {f"{split}_loss": 2 / epoch, f"{split}_accuracy": right}
            row |= {f"{stage}_drift": 0.01 * epoch for stage in strategy.split("+")[1:]}
            history.append(row)
            if epoch in lengths:
                self.summary.append(run | {"epochs": epoch, "test_accuracy": right})
        write_rows(self.folder / name / "history.csv", history)
        write_rows(self.folder / "summary.csv", self.summary)

    def largest(self) -> list[dict]:
        return [run for run in plot.read(self.folder) if run["train_images"] == 1000]


def made_up_study(folder: Path) -> Study:
    """Three strategies, two seeds of 2 and 4 epochs on 1,000 images, smaller ones of 2 epochs,
    another rate, and the usual mistake."""
    study = Study(folder)
    for strategy in ("fc+layer3+layer4", "fc", "fc+layer4"):
        for seed in (0, 1):
            study.add(strategy, 2, 4, seed=seed)
            study.add(strategy, 2, seed=seed, size=100)
    study.add("fc+layer4", 2, learning_rates="fc=0.001 layer4=0.01")
    study.add("fc+layer4", 2, frozen_batchnorm="train")
    return study


@pytest.fixture
def study(tmp_path):
    return made_up_study(tmp_path)


def labelled(axis) -> dict:
    lines = {line.get_label(): line for line in axis.get_lines()}
    return {label: line for label, line in lines.items() if not label.startswith("_")}


VARIANTS = ["fc+layer4 (layer4=0.01)", "fc+layer4, usual mistake"]


def test_the_learning_curves_are_the_seeds_mean_and_spread(study):
    figure = plot.curves(study.largest(), "a title")
    axis = figure.axes[3]
    lines = labelled(axis)
    seeds = [f"{name} (2 seeds)" for name in plot.STRATEGIES]
    assert list(lines) == [*seeds, *(f"{name} (1 seed)" for name in VARIANTS)]
    assert axis.get_ylabel() == "test accuracy" and axis.get_xlabel() == "epoch"
    assert figure.axes[0].get_ylabel() == "train loss (nats)"
    for line, band, strategy in zip(lines.values(), axis.collections, plot.STRATEGIES):
        zero = [accuracy(strategy, epoch, 0, 1000) for epoch in (1, 2, 3, 4)]
        one = [accuracy(strategy, epoch, 1, 1000) for epoch in (1, 2, 3, 4)]
        np.testing.assert_allclose(line.get_ydata(), np.mean([zero, one], axis=0))
        extents = band.get_paths()[0].get_extents()
        assert extents.y0 == pytest.approx(zero[0]) and extents.y1 == pytest.approx(one[-1])
    styles = {(line.get_linestyle(), line.get_marker()) for line in lines.values()}
    assert len(styles) == 5  # told apart without colours


def test_the_table_has_every_seed_and_the_test_set_s_error(study):
    axis = plot.table(study.largest(), "a title").axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    lengths = [f"{name}, {epochs} epochs" for name in plot.STRATEGIES for epochs in (2, 4)]
    assert names == [*lengths, *(f"{name}, 2 epochs" for name in VARIANTS)]
    means = [container.lines[0].get_xdata()[0] for container in axis.containers]
    assert means[3] == pytest.approx(accuracy("fc+layer4", 4, 0.5, 1000))
    (low, _), (high, _) = axis.containers[3].lines[2][0].get_segments()[0]
    assert (high - low) / 2 == pytest.approx((means[3] * (1 - means[3]) / 400) ** 0.5)


def test_runs_of_two_kinds_or_sizes_are_never_one_line(tmp_path, capsys, monkeypatch):
    study, drawn = Study(tmp_path), {}
    study.add("fc", 1)
    kinds = {"dataset": "mine", "weights": "other", "precision": "fp32", "model": "resnet50"}
    kinds |= {"split": "val"}
    for setting, value in (kinds | {"image_size": 64, "batch_size": 32}).items():
        study.add("fc", 1, **{setting: value})
    monkeypatch.setattr(plot, "save", lambda file, _, runs, title: drawn.update({file.name: runs}))
    plot.main([str(tmp_path)])
    assert "not drawn: 2 runs on fewer or smaller images" in capsys.readouterr().out
    assert len(drawn) == 12 and {len(runs) for runs in drawn.values()} == {1}
    for value in kinds.values():
        assert any(re.search(f"{value}-.*curves.png", name) for name in drawn)


def test_every_picture_that_there_is_something_for(study):
    """Whatever a notebook has left in the environment."""
    folder = study.folder
    mistake = {"file": "01.png", "true": "cat", "said": "dog", "probability": 0.99}
    write_rows(folder / "one/epoch2.mistakes/mistakes.csv", [mistake])
    Image.new("RGB", (32, 32), "red").save(folder / "one/epoch2.mistakes/01.png")
    (folder / "one/epoch2.confusion.csv").write_text("true class,cat,dog\ncat,3,1\ndog,0,4\n")
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    words = [sys.executable, str(ROOT / "plot.py"), str(folder)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    names = ["curves", "table", "one/epoch2.confusion", "one/epoch2.mistakes/mistakes"]
    files = [folder / f"{name}.png" for name in names]
    assert [line for line in done.stdout.splitlines() if ".png" in line] == list(map(str, files))
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 2000
    assert not [*folder.rglob(".*")]


@pytest.mark.parametrize(
    "file, text, expected",
    [
        ("summary.csv", None, "summary.csv is not what .*No such file.*compare.py .* --csv "),
        ("fc-*/history.csv", "epoch,train_loss\n1,x\n", "history.csv is not what .* write"),
        ("fc-*/history.csv", None, "history.csv is not what .*No such file"),
        ("*/history.csv", "epoch\n1\n2\n3\n4\n", "cannot draw .*curves.png .*train_loss"),
        ("x/a.confusion.csv", "true class,dog\ncat,2\n", "cannot draw .*x/a.confusion.png"),
        ("x/a.mistakes/mistakes.csv", "file\n01.png\n", "cannot draw .*mistakes.png .*No such"),
        ("curves.png/in the way", "", "cannot draw .*curves.png .*Is a directory"),
    ],
)
def test_what_cannot_be_drawn_is_named_in_one_line(study, capsys, file, text, expected):
    for path in list(study.folder.glob(file)) or [study.folder / file]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
    line = complaint(plot.main, [study.folder], capsys)
    assert re.search(expected, line), line
    assert not [*study.folder.rglob(".*")]


@pytest.mark.parametrize("folder", sorted((ROOT / "study/results").glob("*/summary.csv")))
def test_the_study_s_figures_are_those_of_its_histories(folder):
    """And every run of the summary can be drawn."""
    runs = plot.read(folder.parent)
    for run in runs:
        assert run["history"]["test_accuracy"][-1] == pytest.approx(run["test_accuracy"], abs=5e-4)
    plot.curves(runs[:1], "a title")


@pytest.mark.filterwarnings("error:Glyph")
def test_letters_that_matplotlib_s_font_lacks_are_taken_from_another(study, monkeypatch):
    study.add("fc", 2, learning_rates="\u1d81=1")  # which STIXGeneral has, and DejaVu Sans has not
    monkeypatch.setattr(plot, "FONTS", ["None Such", "STIXGeneral"])
    with plot.matplotlib.rc_context():
        plot.main([str(study.folder)])
        assert plot.matplotlib.rcParams["font.family"] == ["DejaVu Sans", "STIXGeneral"]
