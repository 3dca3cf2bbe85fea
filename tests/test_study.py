"""The benchmark and the study's own pictures, on little work."""

import time

import pytest
from conftest import ROOT, rows
from test_plot import VARIANTS, accuracy, labelled, made_up_study

import plot
from plumbing.files import write_rows
from study import benchmark, pictures

LITTLE = ("--dataset", "synthetic", "--weights", "none", "--image-size", "32", "--train-size", "40")
LITTLE += ("--batch-size", "16", "--precision", "fp32", "--device", "cpu")
COLUMNS = set(rows(ROOT / "study/results/h100/benchmark.csv")[0])  # of the committed files


@pytest.mark.slow
def test_all_four_learn_the_same_and_are_written_down(tmp_path, capsys):
    file = tmp_path / "new" / "speed.csv"
    benchmark.main([*LITTLE, "--strategies", "fc+layer4", "--epochs", "2", "--csv", str(file)])
    out = capsys.readouterr().out
    table = rows(file)
    assert set(table[0]) == COLUMNS
    assert [row["variant"] for row in table] == list(benchmark.VARIANTS)
    for row in table:
        assert float(row["train_loss"]) == pytest.approx(float(table[0]["train_loss"]), rel=2e-3)
        assert 10 * float(row["seconds_per_epoch"]) < float(row["projected_10_epochs"])
        assert float(row["peak_host_bytes"]) > 1e8 and float(row["peak_device_bytes"]) == 0
        assert (float(row["fill_seconds"]) > 0.01) == (row["variant"] == "ours")
    assert "40 of 2,000 train and 10 of 60 test images" in out
    assert max(map(len, out.splitlines()[1:])) <= 80 and "\r" not in out
    assert all(f"\n{variant} " in out for variant in benchmark.VARIANTS)


def measured(seconds: float) -> dict[str, float]:
    """What a variant gives, made up."""
    result = dict.fromkeys(("train_loss", "test_accuracy", "peak_host_bytes"), 1.0)
    result |= {"fill_seconds": 3.0, "seconds_per_epoch": seconds, "eval_seconds": 1.0}
    result |= {"peak_device_bytes": 0, "measured_seconds": 15.0}
    return result | {"read_seconds": 0.5, "wall_seconds": 20.0}


def test_what_was_measured_is_kept_and_the_four_runs_are_compared(monkeypatch, tmp_path, capsys):
    """The textbook takes 2 s an epoch and ours half a second; Ctrl-C ends the second benchmark."""
    asked, stops = [], []

    def measure(variant, root, strategy, args):
        if variant in stops:
            raise KeyboardInterrupt
        asked.append((strategy, variant))
        return measured({"ours": 0.5}.get(variant, 2.0))

    monkeypatch.setattr(benchmark, "measure", measure)
    words = [*LITTLE, "--csv", str(tmp_path / "speed.csv")]
    benchmark.main(words)
    expected = [(s, variant) for s in benchmark.STRATEGIES for variant in benchmark.VARIANTS]
    table = rows(tmp_path / "speed.csv")
    assert asked == expected == [(row["strategy"], row["variant"]) for row in table]
    ten, fifty = (float(table[4][f"projected_{epochs}_epochs"]) for epochs in (10, 50))
    usual, here = 2 * (ten + fifty), 2 * float(table[7]["projected_50_epochs"])
    out = capsys.readouterr().out
    assert f"{usual:,.0f} s the textbook's way, {here:,.0f} s here" in out
    assert f"{usual / here:.1f} times as fast" in out
    stops.append("ours-nocache")
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(words)
    table = rows(tmp_path / "speed.csv")
    assert [row["variant"] for row in table] == ["textbook", "textbook-tuned"]


def test_projections_count_everything_once():
    row = benchmark.row_of("fc", "ours", measured(5.0), sizes=(100, 50), full=(1000, 100))
    start_up, fill, epoch = 20 - 15 - 1 + 0.5 * 1100 / 150, 3 * 2100 / 250, 5 * 10 + 1 * 2
    assert row["projected_10_epochs"] == pytest.approx(start_up + fill + 10 * epoch)
    assert row["projected_50_epochs"] == pytest.approx(start_up + fill + 50 * epoch)
    assert row["images_per_second"] == pytest.approx(20) and set(row) == COLUMNS


def test_figures_are_medians_and_measure_all_there_was(monkeypatch, tmp_path):
    history = []
    for train, test in [(9.0, 1.0), (2.0, 1.5), (3.0, 1.5)]:
        row = {"seconds": train + test, "train_seconds": train}
        history.append(row | {"train_loss": train, "test_accuracy": 0.25})
    monkeypatch.setattr(benchmark, "run_ours", lambda *_: (history, 7.0))
    monkeypatch.setattr(benchmark.datasets, "load", lambda *_: time.sleep(0.1))
    args = benchmark.Namespace(device="cpu", image_size=32)
    figures = benchmark.figures("ours", tmp_path, "fc", args)
    assert figures["seconds_per_epoch"] == 3.0 and figures["eval_seconds"] == 1.5
    assert figures["measured_seconds"] == pytest.approx(7 + 14 + 4)
    assert 0.2 <= figures["read_seconds"] < 1
    assert figures["train_loss"] == 3.0 and figures["test_accuracy"] == 0.25


@pytest.fixture
def study(tmp_path):
    return made_up_study(tmp_path)


def test_a_sweep_takes_runs_of_one_length_and_all_else_equal(study):
    study.add("fc+layer4", 2, size=50, image_size=64)
    axis = pictures.sweep(plot.read(study.folder), "train_images", "training images").axes[0]
    labels = [container.get_label() for container in axis.containers]
    assert labels == [f"{name}, 2 epochs" for name in (*plot.STRATEGIES, *VARIANTS)]
    x, y = axis.containers[1].lines[0].get_data()
    expected = [accuracy("fc+layer4", 2, 0.5, size) for size in (100, 1000)]
    assert list(x) == [100, 1000] and y == pytest.approx(expected)
    assert pictures.sweep(study.largest(), "train_images", "training images") is None


def test_the_drift_has_a_line_for_each_stage_and_rate(study):
    lines = labelled(pictures.drift(plot.read(study.folder)).axes[0])
    assert list(lines) == [
        "layer3 at 1e-05, fc+layer3+layer4, 1,000 images",
        "layer4 at 0.0001, fc+layer3+layer4, 1,000 images",
        "layer4 at 0.0001, fc+layer4, 1,000 images",
        "layer4 at 0.0001, fc+layer4, usual mistake, 1,000 images",
        "layer4 at 0.01, fc+layer4, 1,000 images",
    ]
    assert [len(line.get_xdata()) for line in lines.values()] == [4, 4, 4, 2, 2]


def test_the_race_is_the_longest_run_s_accuracy_by_each_script_s_seconds(study):
    file, runs = study.folder / "benchmark.csv", plot.read(study.folder)
    assert pictures.race(runs, file) is None
    table = []
    for variant, ten, fifty in [("textbook", 100, 500), ("textbook-tuned", 9, 9), ("ours", 20, 60)]:
        row = {"strategy": "fc+layer4", "variant": variant}
        table.append(row | {"projected_10_epochs": ten, "projected_50_epochs": fifty})
    write_rows(file, table)
    lines = labelled(pictures.race(runs, file).axes[0])
    assert list(lines) == ["fc+layer4, textbook", "fc+layer4, ours"]
    expected = [accuracy("fc+layer4", epoch, 0, 1000) for epoch in (1, 2, 3, 4)]
    for line, seconds in zip(lines.values(), ([10, 20, 30, 40], [11, 12, 13, 14])):
        assert list(line.get_xdata()) == seconds
        assert line.get_ydata() == pytest.approx(expected)
    write_rows(file, [row | {"strategy": "fc+layer2"} for row in table])
    assert pictures.race(runs, file) is None
