"""The usual script and the benchmark, on little work."""

import csv

import numpy as np
import pytest
import torch
from conftest import complaint, rows
from PIL import Image
from torch import nn

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
        speed = 40 / number["seconds_per_epoch"]
        assert number["images_per_second"] == pytest.approx(speed)
        ten, fifty = number["projected_10_epochs"], number["projected_50_epochs"]
        assert 0 < 10 * number["seconds_per_epoch"] < ten < fifty
        assert number["peak_host_bytes"] > 1e8 and number["peak_device_bytes"] == 0
        assert (number["fill_seconds"] > 0) == (row["variant"] == "ours")
    assert "40 of 2,000 train and 10 of 60 test images" in out
    assert max(map(len, out.splitlines()[1:])) <= 80 and "\r" not in out
    assert all(f"\n{variant} " in out for variant in benchmark.VARIANTS)


def measured(variant: str, seconds: float = 2.0) -> dict:
    """What a variant gives, made up."""
    fill = 3.0 if variant == "ours" else 0.0
    return {
        "fill_seconds": fill,
        "seconds_per_epoch": seconds,
        "eval_seconds": 1.0,
        "measured_seconds": fill + 6.0,
        "train_loss": 1.0,
        "test_accuracy": 0.5,
        "peak_host_bytes": 1,
        "peak_device_bytes": 0,
        "wall_seconds": 20.0,
    }


@pytest.fixture
def quick(monkeypatch):
    """A benchmark that does not measure: the textbook takes 2 s an epoch, ours half a second.
    Gives the list of what was asked for."""
    asked = []

    def measure(variant, root, strategy, args):
        asked.append((strategy, variant))
        seconds = {"ours": 0.5}.get(variant, 2.0)
        return measured(variant, seconds)

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "rates", lambda *_: (1e11, 1e10))
    return asked


def test_all_strategies_are_measured_and_the_four_runs_compared(quick, tmp_path, capsys):
    benchmark.main([*LITTLE, "--csv", str(tmp_path / "speed.csv")])
    out = capsys.readouterr().out
    expected = [(s, variant) for s in benchmark.STRATEGIES for variant in benchmark.VARIANTS]
    assert quick == expected
    table = rows(tmp_path / "speed.csv")
    assert [(row["strategy"], row["variant"]) for row in table] == expected
    theirs = [row for row in table if row["variant"] == "textbook" and row["strategy"] != "fc"]
    ours = [row for row in table if row["variant"] == "ours" and row["strategy"] != "fc"]
    usual = sum(float(r["projected_10_epochs"]) + float(r["projected_50_epochs"]) for r in theirs)
    here = sum(float(row["projected_50_epochs"]) for row in ours)
    assert f"{usual:,.0f} s the textbook's way, {here:,.0f} s here" in out
    assert f"{usual / here:.1f} times as fast" in out


def test_a_benchmark_that_is_stopped_keeps_what_it_has(quick, monkeypatch, tmp_path):
    measure = benchmark.measure

    def stopped(variant, *more):
        if variant == "ours-nocache":
            raise KeyboardInterrupt
        return measure(variant, *more)

    monkeypatch.setattr(benchmark, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*LITTLE, "--strategies", "fc", "--csv", str(tmp_path / "speed.csv")])
    table = rows(tmp_path / "speed.csv")
    assert [row["variant"] for row in table] == ["textbook", "textbook-tuned"]


@pytest.mark.parametrize(
    "flags, culprit",
    [
        (["--lr", "fc=1"], "--lr is not for the benchmark"),
        (["--cache", "off"], "--cache is not for the benchmark"),
        (["--unfreeze", "layer4"], "--unfreeze is not for the benchmark"),
        (["--strategies", "layer2"], "invalid choice: 'layer2'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--epochs", "0"], "--epochs: must be a whole number"),
        (["--csv", "/proc/nothing/speed.csv"], "/proc/nothing"),
        (["--weights", __file__], "test_study.py is damaged"),
    ],
)
def test_what_the_benchmark_refuses(quick, capsys, flags, culprit):
    assert culprit in complaint(benchmark.main, [*LITTLE, *flags], capsys)
    assert not quick


def test_projections_count_everything_once():
    result = measured("ours") | {"seconds_per_epoch": 5.0, "measured_seconds": 15.0}
    row = benchmark.row_of("fc", "ours", result, sizes=(100, 50), full=(1000, 100))
    start_up, fill, epoch = 20 - 15, 3 * 2100 / 250, 5 * 10 + 1 * 2
    assert row["projected_10_epochs"] == pytest.approx(start_up + fill + 10 * epoch)
    assert row["projected_50_epochs"] == pytest.approx(start_up + fill + 50 * epoch)
    assert row["images_per_second"] == pytest.approx(20) and set(row) == COLUMNS


@pytest.mark.parametrize("writing, every_epoch", [(0.5, 0.5), (30, 52 / 20)])
def test_projections_count_the_pictures_that_are_read_and_the_checkpoints(writing, every_epoch):
    """Read twice and written once more where it was measured, beside what train.py did."""
    result = measured("ours") | {"seconds_per_epoch": 5.0, "measured_seconds": 15.0}
    result |= {"wall_seconds": 60, "read_seconds": 3.0, "write_seconds": writing}
    row = benchmark.row_of("fc", "ours", result, sizes=(100, 50), full=(1000, 100))
    start_up, fill, epoch = 60 - 15 - 6 - writing, 3 * 2100 / 250, 5 * 10 + 1 * 2
    reading = 3 * 1100 / 150
    expected = start_up + reading + fill + 10 * (epoch + every_epoch)
    assert row["projected_10_epochs"] == pytest.approx(expected) and set(row) == COLUMNS


def test_figures_are_medians_and_measure_all_there_was():
    history = []
    for train, test in [(9.0, 1.0), (2.0, 1.5), (3.0, 1.5)]:
        row = {"seconds": train + test, "train_seconds": train}
        history.append(row | {"train_loss": train, "test_accuracy": 0.25})
    figures = benchmark.figures(history, 7.0, torch.device("cpu"))
    assert figures["seconds_per_epoch"] == 3.0 and figures["eval_seconds"] == 1.5
    assert figures["measured_seconds"] == pytest.approx(7 + 14 + 4)
    assert figures["train_loss"] == 3.0 and figures["test_accuracy"] == 0.25


def test_flops_are_counted_as_by_hand():
    """fc: 512 x 10 products forward and for the weights' gradient. fc+layer4 at 224x224: layer4's
    convolutions, of which the two that read its input need no gradient of it."""
    assert benchmark.work("fc", 64)[0] == 2 * 2 * 512 * 10
    first, second, shortcut = 9 * 256 * 512 * 49, 9 * 512 * 512 * 49, 256 * 512 * 49
    tail, prefix, numbers = benchmark.work("fc+layer4", 224)
    layer4 = first + 3 * second + shortcut
    assert numbers == 256 * 14 * 14
    assert tail == 2 * (3 * layer4 - first - shortcut) + 2 * 3 * 512 * 10
    whole = 2 * 1_814_073_344 - 2 * 512 * 990  # of resnet18 with ten classes
    assert prefix + 2 * layer4 + 2 * 512 * 10 == whole


def test_pictures_are_written_in_the_order_of_the_labels(tmp_path):
    pixels = torch.randint(256, (6, 8, 8, 3), dtype=torch.uint8)
    labels = torch.tensor([1, 0, 1, 0, 1, 0])
    images = benchmark.data.Images(pixels, labels, ("cat", "dog"))
    benchmark.write_pictures(tmp_path, images)
    files = sorted(tmp_path.glob("*/*.png"))
    assert [file.parent.name for file in files] == ["cat"] * 3 + ["dog"] * 3
    read = [np.asarray(Image.open(file)) for file in files]
    assert np.array_equal(read, pixels[[1, 3, 5, 0, 2, 4]].numpy())


def test_committed_figures_have_the_columns_of_the_table():
    files = list((benchmark.Path(benchmark.__file__).parent / "results").glob("*/benchmark.csv"))
    assert files
    for file in files:
        with open(file, newline="", encoding="utf-8") as opened:
            assert set(next(csv.reader(opened))) == COLUMNS


# ---------------------------------------------------------------- the usual script


@pytest.fixture
def pictures(tmp_path):
    """root/train and root/test of two classes, four random pictures of 32x32 each."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
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
    (row,) = textbook.train(
        model, {"fc": 1e-3}, pictures, epochs, 32, 4, mistake=mistake, workers=0
    )
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            buffers = ("running_mean", "running_var", "num_batches_tracked")
            statistics |= {f"{name}.{buffer}" for buffer in buffers}
    expected = {"fc.weight", "fc.bias"}
    if mistake:
        expected |= statistics
    assert changed == expected
    assert 0 < row["train_loss"] < 10 and 0 < row["train_seconds"] < row["seconds"]
