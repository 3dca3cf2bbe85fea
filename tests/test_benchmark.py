"""The benchmark on little work: its rows, and that all four variants learn the same."""

import pytest
from conftest import rows

import benchmark

LITTLE = ["--dataset", "synthetic", "--weights", "none", "--image-size", "32", "--train-size", "40", "--batch-size", "16"]


def test_all_four_learn_the_same_and_are_written_down(tmp_path, capsys):
    benchmark.main([*LITTLE, "--strategies", "layer4", "--epochs", "2", "--precision", "fp32", "--device", "cpu",
                    "--csv", str(tmp_path / "new" / "speed.csv")])
    out = capsys.readouterr().out
    table = rows(tmp_path / "new" / "speed.csv")
    assert tuple(table[0]) == benchmark.COLUMNS and [row["variant"] for row in table] == list(benchmark.VARIANTS)
    for row in table:
        assert float(row["train_loss"]) == pytest.approx(float(table[0]["train_loss"]), rel=2e-3)
        assert float(row["images_per_second"]) == pytest.approx(40 / float(row["seconds_per_epoch"]))
        assert 0 < 10 * float(row["seconds_per_epoch"]) < float(row["projected_10_epochs"]) < float(row["projected_50_epochs"])
        assert int(row["peak_host_bytes"]) > 1e8 and row["peak_device_bytes"] == "0"
        assert (float(row["fill_seconds"]) > 0) == (row["variant"] == "ours")
    assert max(map(len, out.splitlines()[1:-1])) <= 80 and "40 of 2,000 train and 10 of 60 test images" in out
    assert all(f"\n{variant} " in out for variant in benchmark.VARIANTS) and "\r" not in out


def test_projections_count_everything_once():
    result = {"wall_seconds": 20.0, "fill_seconds": 3.0, "train_seconds": [4.0, 6.0], "eval_seconds": [1.0, 1.0],
              "peak_host_bytes": 1, "peak_device_bytes": 0, "train_loss": 1.0, "test_accuracy": 0.5}
    row = benchmark.row("fc", "ours", result, sizes=(100, 50), full=(1000, 100))
    start_up, fill, epoch = 20 - 3 - 10 - 2, 3 * 2100 / 250, 5 * 10 + 1 * 2
    assert row["projected_10_epochs"] == pytest.approx(start_up + fill + 10 * epoch)
    assert row["projected_50_epochs"] == pytest.approx(start_up + fill + 50 * epoch)


def test_flops_are_counted_as_by_hand():
    """fc: 512 x 10 products forward and for the weights' gradient; layer4 + fc at 224x224: DESIGN's convolutions."""
    assert benchmark.work(["fc"], 64)[0] == 2 * 2 * 512 * 10
    first, second, shortcut = 9 * 256 * 512 * 49, 9 * 512 * 512 * 49, 256 * 512 * 49
    tail, prefix, numbers = benchmark.work(["layer4", "fc"], 224)
    assert numbers == 256 * 14 * 14
    assert tail == 2 * (3 * (first + 3 * second + shortcut) - first - shortcut) + 2 * 3 * 512 * 10
    assert prefix + 2 * (first + 3 * second + shortcut) + 2 * 512 * 10 == 2 * 1_814_073_344 - 2 * 512 * 990
