"""The pictures: what is drawn is what stands in the CSV files. Skipped where matplotlib is missing."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, complaint

try:
    import plot
except SystemExit:
    plot = None
drawing = pytest.mark.skipif(plot is None, reason="needs matplotlib")
RATES = {"fc": "fc=0.001", "layer4+fc": "layer4=0.0001 fc=0.001", "layer3+layer4+fc": "layer3=1e-05 layer4=0.0001 fc=0.001"}


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def accuracy(unfrozen: str, epoch: int, seed: int, size: int) -> float:
    return 0.7 + 0.05 * len(unfrozen) / 10 + 0.001 * epoch + 0.01 * seed + size * 1e-6


@pytest.fixture
def study(tmp_path):
    """Three strategies, two seeds of 2 and 4 epochs on 1,000 images, smaller ones of 2, another rate, and the usual mistake."""
    summary = []

    def run(unfrozen: str, epochs: int, seed: int = 0, size: int = 1000, rates: str | None = None, batchnorm: str = "eval") -> None:
        name = f"cifar10-{unfrozen}-e{epochs}-s{seed}-n{size}-{rates}-{batchnorm}"
        rows = [{"epoch": epoch, "train_loss": 1 / epoch, "train_accuracy": 0.9, "test_loss": 2 / epoch,
                 "test_accuracy": accuracy(unfrozen, epoch, seed, size)} for epoch in range(1, epochs + 1)]
        for row in rows:
            row.update({f"{stage}_drift": 0.01 * row["epoch"] for stage in unfrozen.split("+")[:-1]})
        write(tmp_path / name / "history.csv", rows)
        summary.append({"run": name, "dataset": "cifar10", "unfrozen": unfrozen, "epochs": epochs, "seed": seed, "train_images": size,
                        "test_accuracy": rows[-1]["test_accuracy"], "test_images": 400, "learning_rates": rates or RATES[unfrozen], "frozen_batchnorm": batchnorm})

    for unfrozen in ("layer3+layer4+fc", "fc", "layer4+fc"):
        for seed in (0, 1):
            for epochs in (2, 4):
                run(unfrozen, epochs, seed)
            run(unfrozen, 2, seed, size=100)
    run("layer4+fc", 2, size=100, rates="layer4=0.01 fc=0.001")
    run("layer4+fc", 2, size=100, batchnorm="train")
    write(tmp_path / "summary.csv", summary)
    return tmp_path


def of_size(runs: list[dict], size: int) -> list[dict]:
    return [run for run in runs if run["train_images"] == size]


def labelled(axis) -> dict:
    return {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}


@drawing
def test_the_learning_curves_are_the_seeds_mean_and_spread(study):
    figure = plot.curves(of_size(plot.read(study), 1000))
    axis = figure.axes[3]
    lines = labelled(axis)
    assert list(lines) == ["fc (2 seeds)", "fc + layer4 (2 seeds)", "fc + layer3 + layer4 (2 seeds)"]
    assert axis.get_ylabel() == "test accuracy" and axis.get_xlabel() == "epoch" and figure.axes[0].get_ylabel() == "train loss (nats)"
    for line, band, unfrozen in zip(lines.values(), axis.collections, ("fc", "layer4+fc", "layer3+layer4+fc")):
        zero, one = ([accuracy(unfrozen, epoch, seed, 1000) for epoch in (1, 2, 3, 4)] for seed in (0, 1))
        np.testing.assert_allclose(line.get_ydata(), np.mean([zero, one], axis=0))
        assert band.get_paths()[0].get_extents().y0 == pytest.approx(zero[0]) and band.get_paths()[0].get_extents().y1 == pytest.approx(one[-1])
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines.values()}) == 3  # told apart without colours


@drawing
def test_the_table_has_ours_its_error_and_the_published_figure(study, monkeypatch):
    monkeypatch.setattr(plot, "PUBLISHED", {("fc + layer4", 4): 0.9201})
    monkeypatch.setattr(plot, "FULL_SIZE", 1000)
    axis = plot.table(of_size(plot.read(study), 1000)).axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == [f"{name}, {epochs} epochs" for name in plot.STYLES for epochs in (2, 4)]
    means = [container.lines[0].get_xdata()[0] for container in axis.containers]
    assert means[3] == pytest.approx(accuracy("layer4+fc", 4, 0.5, 1000))
    (low, _), (high, _) = axis.containers[3].lines[2][0].get_segments()[0]
    assert (high - low) / 2 == pytest.approx((means[3] * (1 - means[3]) / 400) ** 0.5)
    crosses = [tuple(np.ravel(line.get_data())) for line in axis.get_lines() if line.get_marker() == "x" and len(line.get_xdata())]
    assert [cross for cross in crosses if not np.isnan(cross[0])] == [(0.9201, 3)]


@drawing
def test_what_differs_from_the_experiment_has_a_name_and_a_style_of_its_own_and_no_published_figure(study):
    figure = plot.table(of_size(plot.read(study), 100))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [f"{name}, 2 epochs" for name in (*plot.STYLES, "fc + layer4 (layer4=0.01)", "fc + layer4, usual mistake")]
    assert len({container.lines[0].get_marker() for container in figure.axes[0].containers}) == 5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a seed", "their mean, ± the test set's standard error"]


@drawing
def test_the_size_curve_takes_runs_of_one_length(study):
    axis = plot.sizes(plot.read(study)).axes[0]
    labels = [container.get_label() for container in axis.containers]
    assert labels == [f"{name}, 2 epochs" for name in (*plot.STYLES, "fc + layer4 (layer4=0.01)", "fc + layer4, usual mistake")]
    x, y = axis.containers[1].lines[0].get_data()
    assert list(x) == [100, 1000] and y == pytest.approx([accuracy("layer4+fc", 2, 0.5, size) for size in (100, 1000)])


@drawing
def test_the_drift_has_a_line_for_each_stage_and_rate(study):
    lines = labelled(plot.drift(plot.read(study)).axes[0])
    assert list(lines) == ["layer3 at 1e-05, with fc + layer3 + layer4, 1,000 images", "layer4 at 0.0001, with fc + layer3 + layer4, 1,000 images",
                           "layer4 at 0.0001, with fc + layer4, 1,000 images", "layer4 at 0.0001, with fc + layer4, usual mistake, 100 images",
                           "layer4 at 0.01, with fc + layer4, 100 images"]
    assert [len(line.get_xdata()) for line in lines.values()] == [4, 4, 4, 2, 2]


@drawing
def test_every_picture_that_there_is_something_for(study, capsys):
    write(study / "one" / "mistakes.csv", [{"true": "cat", "said": "dog", "probability": 0.99, "png": PNG}])
    (study / "one" / "confusion.csv").write_text("true class,cat,dog\ncat,3,1\ndog,0,4\n")
    plot.main([str(study)])
    files = [study / name for name in ("curves-100.png", "table-100.png", "curves.png", "table.png", "sizes.png", "drift.png", "one/confusion.png", "one/mistakes.png")]
    assert capsys.readouterr().out.split() == list(map(str, files)) and {*files} == {*study.rglob("*.png")}
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 2000 for file in files)
    assert not [*study.rglob(".*")]


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"  # one red pixel


@drawing
@pytest.mark.parametrize("damage, expected", [
    (lambda study: (study / "summary.csv").unlink(), "no .*/summary.csv: python evaluate.py"),
    (lambda study: (study / "summary.csv").write_text("hello\nworld\n"), "summary.csv is not what .* write"),
    (lambda study: (study / "summary.csv").write_text("run,unfrozen,learning_rates\nnowhere,fc,fc=0.001\n"), "No such file .*nowhere/history.csv"),
    (lambda study: next(study.glob("*/history.csv")).write_text("epoch,train_loss\n1,x\n"), "history.csv or .*summary.csv is not what"),
    (lambda study: next(study.glob("*/history.csv")).write_text(""), "history.csv or .*summary.csv is not what"),
    (lambda study: next(study.glob("cifar10-fc-e4*/history.csv")).write_text("epoch\n1\n"), "holds nothing to draw curves.png from .*train_loss"),
    (lambda study: write(study / "x/confusion.csv", [{"true class": "cat", "cat": 1, "dog": 2}]), "x/confusion.csv holds nothing to draw"),
    (lambda study: write(study / "x/mistakes.csv", [{"png": "!"}]), "x/mistakes.csv holds nothing to draw"),
    (lambda study: (study / "curves.png").mkdir(), "curves.png"),
])
def test_what_cannot_be_drawn_is_named_in_one_line(study, capsys, damage, expected):
    damage(study)
    line = complaint(plot.main, [study], capsys)
    assert re.search(expected, line), line


def test_without_matplotlib_it_says_what_to_install():
    hidden = f"import sys, runpy; sys.modules['matplotlib'] = None; runpy.run_path({str(ROOT / 'plot.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "plot.py: error: drawing needs matplotlib: pip install -r requirements-plot.txt\n"
