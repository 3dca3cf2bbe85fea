"""compare.py: the table of what runs logged, their differences, and how far features moved."""

import shutil

import pytest
import torch
from conftest import checkpoint, complaint, history, rows

import compare
import data
import evaluate
import freeze
from plumbing import datasets
from plumbing.weights import load_model

NAMES = ["train", "loss", "test", "loss", "accuracy", "images", "epochs", "run"]


@pytest.fixture(scope="module")
def lengths(finished):
    return [str(finished / "epoch1.pt"), str(finished / "epoch2.pt")]


# ---------------------------------------------------------------- the table


def test_what_was_logged_is_what_is_scored(lengths, tmp_path, monkeypatch):
    evaluate.main([*lengths, "--csv", str(tmp_path / "scored.csv")])
    monkeypatch.setattr(freeze, "build", None)  # no network is built, nothing is scored
    compare.main([*lengths, "--csv", str(tmp_path / "logged.csv")])
    scored, logged = rows(tmp_path / "scored.csv"), rows(tmp_path / "logged.csv")
    assert len(logged) == 2
    for one, other in zip(scored, logged):
        assert float(other.pop("test_loss")) == pytest.approx(float(one.pop("test_loss")), rel=1e-4)
    assert logged == scored


def test_a_damaged_checkpoint_does_not_cost_the_others_their_rows(lengths, tmp_path, capsys):
    (tmp_path / "half.pt").write_bytes(b"half")
    words = [tmp_path / "half.pt", *lengths, "--csv", tmp_path / "summary.csv"]
    assert str(tmp_path / "half.pt") in complaint(compare.main, words, capsys)
    assert [row["epochs"] for row in rows(tmp_path / "summary.csv")] == ["1", "2"]


def test_the_table_has_a_row_for_each_length_of_a_run(finished, lengths, tmp_path, capsys):
    compare.main([*lengths, "--csv", str(tmp_path / "summary.csv")])
    table = rows(tmp_path / "summary.csv")
    columns = "train_loss", "test_loss", "test_accuracy"
    logged = history(finished, *columns)
    assert [(row["run"], row["epochs"]) for row in table] == [
        (finished.name, "1"),
        (finished.name, "2"),
    ]
    assert [[float(row[column]) for column in columns] for row in table] == logged
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == NAMES
    for line, (train_loss, test_loss, accuracy), row in zip(lines, logged, table):
        figures = [f"{train_loss:.4f}", f"{test_loss:.4f}", f"{accuracy:.2%}"]
        assert line.split() == [*figures, "60", row["epochs"], row["run"]]


# ---------------------------------------------------------------- image by image


def test_runs_are_compared_image_by_image(run, tmp_path, capsys):
    small = "--image-size", "32", "--epochs", "1"
    fc_run = run(*small)
    layer4_run = run(*small, "--unfreeze", "layer4", "--lr", "layer4=1e-3")
    files = [str(fc_run / "epoch1.pt"), str(layer4_run / "epoch1.pt")]
    capsys.readouterr()
    compare.main([*files, "--paired", str(tmp_path / "paired.csv")])
    (row,) = rows(tmp_path / "paired.csv")
    fc = checkpoint(fc_run, 1)["test_correct"].double().numpy()
    layer4 = checkpoint(layer4_run, 1)["test_correct"].double().numpy()
    assert float(row["difference"]) == pytest.approx((layer4 - fc).mean())
    assert float(row["standard_error"]) == pytest.approx((layer4 - fc).std() / 60**0.5)
    assert int(row["only_run_right"]) == (layer4 > fc).sum()
    assert int(row["only_other_right"]) == (fc > layer4).sum()
    assert int(row["test_images"]) == 60
    assert (row["run"], row["other"]) == (layer4_run.name, fc_run.name)
    assert (row["epochs"], row["other_epochs"]) == ("1", "1")
    difference, error = float(row["difference"]), float(row["standard_error"])
    line = f"{100 * difference:+.2f} ± {100 * error:.2f} points"
    assert capsys.readouterr().out.count(line) == 2  # of the pair, and in the verdict


def test_what_was_right_in_the_log_is_what_is_right_when_scored(finished):
    images = datasets.synthetic("test")
    for epochs in (1, 2):
        saved = checkpoint(finished, epochs)
        said = load_model(saved).model.eval()(data.transform(images.pixels, 48)).argmax(1)
        assert torch.equal(saved["test_correct"], said == images.labels)


def test_every_pair_is_compared(lengths, finished, tmp_path, capsys):
    other = tmp_path / "other/epoch2.pt"
    other.parent.mkdir()
    shutil.copy(lengths[1], other)
    compare.main([*lengths, str(other), "--paired", str(tmp_path / "paired.csv")])
    table = rows(tmp_path / "paired.csv")
    names = ("run", "epochs", "other", "other_epochs")
    assert [tuple(row[name] for name in names) for row in table] == [
        (finished.name, "2", finished.name, "1"),
        ("other", "2", finished.name, "1"),
        ("other", "2", finished.name, "2"),
    ]
    assert float(table[2]["difference"]) == float(table[2]["standard_error"]) == 0
    assert capsys.readouterr().out.count("points") == 3


def test_runs_on_other_test_images_are_not_compared(finished, lengths, tmp_path, capsys):
    other = checkpoint(finished)
    other["settings"]["test_data"] = "another"
    torch.save(other, tmp_path / "other.pt")
    files = [lengths[1], tmp_path / "other.pt"]
    tables = ["--csv", tmp_path / "summary.csv", "--paired", tmp_path / "paired.csv"]
    assert "--paired" in complaint(compare.main, [*files, *tables], capsys)
    assert not (tmp_path / "paired.csv").exists()
    assert len(rows(tmp_path / "summary.csv")) == 2
    compare.main(list(map(str, files)))
    assert "points" not in capsys.readouterr().out
