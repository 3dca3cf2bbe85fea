"""compare.py: the table of what runs logged, and their differences."""

import pytest
import torch
from conftest import checkpoint, complaint, rows

import compare
import evaluate
import freeze


def test_what_was_logged_is_what_is_scored(finished, tmp_path, monkeypatch, capsys):
    """And a damaged checkpoint does not cost the others their rows."""
    lengths = [str(finished / "epoch1.pt"), str(finished / "epoch2.pt")]
    evaluate.main([*lengths, "--csv", str(tmp_path / "scored.csv")])
    scored_lines = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(freeze, "build", None)  # no network is built, nothing is scored
    half = tmp_path / "half.pt"
    half.write_bytes(b"half")
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(half), *lengths, "--csv", str(tmp_path / "logged.csv")])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and str(half) in printed.err
    for line, scored_line in zip(printed.out.splitlines()[:3], scored_lines[-3:], strict=True):
        assert line.split()[2:] == scored_line.split()[2:]  # all but the losses, that are rounded
    scored, logged = rows(tmp_path / "scored.csv"), rows(tmp_path / "logged.csv")
    assert [(row["run"], row["epochs"]) for row in logged] == [(finished.name, n) for n in "12"]
    for one, other in zip(scored, logged):
        assert float(other.pop("test_loss")) == pytest.approx(float(one.pop("test_loss")), rel=1e-4)
    assert logged == scored


def test_with_validation_pictures_the_images_counted_are_those(finished, tmp_path, capsys):
    """And a run without is under columns of its own."""
    saved = checkpoint(finished)
    saved["val_correct"] = torch.zeros(200, dtype=torch.bool)
    saved["scores"] |= {"val_loss": 3.0, "val_accuracy": 0.25}
    torch.save(saved, tmp_path / "epoch2.pt")
    files = str(tmp_path / "epoch2.pt"), str(finished / "epoch1.pt")
    compare.main([*files, "--csv", str(tmp_path / "summary.csv")])
    row, other = rows(tmp_path / "summary.csv")
    header, line, other_header, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[2:4] == ["val", "loss"] and other_header.split()[2:4] == ["test", "loss"]
    assert line.split()[1:4] == ["3.0000", "25.00%", "200"]
    assert (row["val_images"], row["test_images"]) == ("200", "60")
    assert other["val_accuracy"] == "" and 0 <= float(other["test_accuracy"]) <= 1


def test_runs_are_compared_image_by_image(finished, tmp_path, capsys):
    """Every pair of them, and in words too."""
    files, right = [], torch.rand(3, 60, generator=torch.Generator().manual_seed(0)) < 0.6
    for number, strategy in enumerate(("fc", "fc+layer4", "fc+layer3+layer4")):
        saved = checkpoint(finished)
        saved["settings"] |= {"strategy": strategy, "learning_rates": "fc=0.001"}
        saved["test_correct"] = right[number]
        saved["metadata"]["trainable_parameters"] = number
        files.append(str(tmp_path / strategy / "epoch2.pt"))
        (tmp_path / strategy).mkdir()
        torch.save(saved, files[-1])
    compare.main([*files, "--paired", str(tmp_path / "paired.csv")])
    table = rows(tmp_path / "paired.csv")
    pairs = [("fc+layer4", "fc"), ("fc+layer3+layer4", "fc"), ("fc+layer3+layer4", "fc+layer4")]
    assert [(row["run"], row["other"]) for row in table] == pairs
    row, (other, one, _) = table[0], right.double().numpy()
    difference, error = float(row["difference"]), float(row["standard_error"])
    assert difference == pytest.approx((one - other).mean()) and difference != 0
    assert error == pytest.approx((one - other).std() / 60**0.5)
    assert int(row["only_run_right"]) == (one > other).sum()
    assert int(row["only_other_right"]) == (other > one).sum()
    assert (row["epochs"], row["other_epochs"], row["test_images"]) == ("2", "2", "60")
    figures = f"{100 * difference:+.2f} ± {100 * error:.2f} points"
    printed = capsys.readouterr().out
    assert printed.count(f"  {figures}; of 60 images") == 1
    assert f"fc+layer4 over fc: {figures}" in printed


def test_runs_on_other_test_images_are_not_compared(finished, tmp_path, capsys):
    other = checkpoint(finished)
    other["settings"]["test_data"] = "another"
    torch.save(other, tmp_path / "other.pt")
    files = [str(finished / "epoch2.pt"), str(tmp_path / "other.pt")]
    tables = ["--csv", tmp_path / "summary.csv", "--paired", tmp_path / "paired.csv"]
    assert "--paired" in complaint(compare.main, [*files, *tables], capsys)
    assert not (tmp_path / "paired.csv").exists()
    assert len(rows(tmp_path / "summary.csv")) == 2
    compare.main(files)
    printed = capsys.readouterr().out
    assert "points" not in printed and "2 of 2 runs: no other strategy has the same" in printed
