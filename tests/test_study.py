"""The usual script and the benchmark, on little work."""

import csv
import time

import pytest
import torch
from conftest import ROOT, rows
from torch import nn

import data
import freeze
from study import benchmark, textbook

LITTLE = ("--dataset", "synthetic", "--weights", "none", "--image-size", "32", "--train-size", "40")
LITTLE += ("--batch-size", "16", "--precision", "fp32", "--device", "cpu")
COLUMNS = {
    *("strategy", "variant", "fill_seconds", "seconds_per_epoch", "eval_seconds"),
    *("images_per_second", "projected_10_epochs", "projected_50_epochs"),
    *("peak_host_bytes", "peak_device_bytes", "train_loss", "test_accuracy"),
}


# ---------------------------------------------------------------- the benchmark


@pytest.mark.slow
def test_all_four_learn_the_same_and_are_written_down(tmp_path, capsys):
    file = tmp_path / "new" / "speed.csv"
    benchmark.main([*LITTLE, "--strategies", "fc+layer4", "--epochs", "2", "--csv", str(file)])
    out = capsys.readouterr().out
    table = rows(file)
    assert set(table[0]) == COLUMNS
    assert [row["variant"] for row in table] == list(benchmark.VARIANTS)
    for row in table:
        number = {name: float(row[name]) for name in COLUMNS - {"strategy", "variant"}}
        loss = float(table[0]["train_loss"])
        assert number["train_loss"] == pytest.approx(loss, rel=2e-3)
        assert 10 * number["seconds_per_epoch"] < number["projected_10_epochs"]
        assert number["peak_host_bytes"] > 1e8 and number["peak_device_bytes"] == 0
        assert (number["fill_seconds"] > 0.01) == (row["variant"] == "ours")
    assert "40 of 2,000 train and 10 of 60 test images" in out
    assert max(map(len, out.splitlines()[1:])) <= 80 and "\r" not in out
    assert all(f"\n{variant} " in out for variant in benchmark.VARIANTS)


def measured(seconds: float) -> dict[str, float]:
    """What a variant gives, made up."""
    result = dict.fromkeys(("train_loss", "test_accuracy", "peak_host_bytes"), 1.0)
    result |= {"fill_seconds": 3.0, "seconds_per_epoch": seconds, "eval_seconds": 1.0}
    return result | {
        "peak_device_bytes": 0,
        "measured_seconds": 15.0,
        "read_seconds": 0.5,
        "wall_seconds": 20.0,
    }


@pytest.fixture
def quick(monkeypatch):
    """A benchmark in which the textbook takes 2 s an epoch and ours half a second. Gives the list
    of what was measured; a variant in `quick.stops` is stopped."""

    class Asked(list):
        stops = ()

    asked = Asked()

    def measure(variant, root, strategy, args):
        if variant in asked.stops:
            raise KeyboardInterrupt
        asked.append((strategy, variant))
        return measured({"ours": 0.5}.get(variant, 2.0))

    monkeypatch.setattr(benchmark, "measure", measure)
    return asked


def test_all_strategies_are_measured_and_the_four_runs_compared(quick, tmp_path, capsys):
    benchmark.main([*LITTLE, "--csv", str(tmp_path / "speed.csv")])
    expected = [(s, variant) for s in benchmark.STRATEGIES for variant in benchmark.VARIANTS]
    table = rows(tmp_path / "speed.csv")
    assert quick == expected == [(row["strategy"], row["variant"]) for row in table]
    ten, fifty = (float(table[4][f"projected_{epochs}_epochs"]) for epochs in (10, 50))
    usual, here = 2 * (ten + fifty), 2 * float(table[7]["projected_50_epochs"])
    out = capsys.readouterr().out
    assert f"{usual:,.0f} s the textbook's way, {here:,.0f} s here" in out
    assert f"{usual / here:.1f} times as fast" in out


def test_a_benchmark_that_is_stopped_keeps_what_it_has(quick, tmp_path):
    quick.stops = ("ours-nocache",)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*LITTLE, "--strategies", "fc", "--csv", str(tmp_path / "speed.csv")])
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


@pytest.mark.parametrize("file", sorted(ROOT.glob("study/results/*/benchmark.csv")), ids=str)
def test_committed_figures_have_the_columns_of_the_table(file):
    with open(file, newline="", encoding="utf-8") as opened:
        assert set(next(csv.reader(opened))) == COLUMNS


# ---------------------------------------------------------------- the usual script


@pytest.fixture
def pictures(tmp_path):
    """root/train and root/test of two classes, four random pictures of 32x32 each."""
    pixels = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8)
    images = data.Images(pixels, torch.tensor([0, 1] * 4), ("cat", "dog"))
    for split in ("train", "test"):
        benchmark.write_pictures(tmp_path / split, images)
    return tmp_path


def test_an_index_past_the_end_is_the_mirror_image(pictures):
    images = textbook.Pictures(pictures / "train", 48)
    assert len(images) == 8
    for i in (0, 5):
        image, label = images[i]
        mirrored, same = images[i + 8]
        assert torch.equal(image.flip(2), mirrored) and label == same == i // 4


@pytest.mark.parametrize("mistake", [False, True])
def test_frozen_stays_frozen_except_by_the_usual_mistake(pictures, mistake):
    model = freeze.build("resnet18", 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    epochs = [(torch.randperm(8), torch.rand(8) < 0.5)]
    how = {"mistake": mistake, "workers": 0}
    (row,) = textbook.train(model, {"fc": 1e-3}, pictures, epochs, 32, 4, **how)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {"fc.weight", "fc.bias"}
    for name, module in model.named_modules():
        if mistake and isinstance(module, nn.BatchNorm2d):
            expected |= {f"{name}.{buffer}" for buffer, _ in module.named_buffers()}
    assert changed == expected
    assert 0 < row["train_loss"] < 10 and 0 < row["train_seconds"] < row["seconds"]
