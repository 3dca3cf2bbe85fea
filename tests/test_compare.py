"""compare.py: the table of what runs logged, their differences, and how far features moved."""

import shutil

import pytest
import torch
from conftest import checkpoint, complaint, history, rows

import compare
import data
import evaluate
import freeze
from plumbing import synthetic
from plumbing.scoring import Loaded

NAMES = ["train", "loss", "test", "loss", "accuracy", "images", "epochs", "run"]


@pytest.fixture(scope="module")
def lengths(finished):
    return [str(finished / "epoch1.pt"), str(finished / "epoch2.pt")]


# ---------------------------------------------------------------- the table


def test_what_was_logged_is_what_is_scored(lengths, tmp_path, monkeypatch):
    evaluate.main([*lengths, "--csv", str(tmp_path / "scored.csv")])
    monkeypatch.setattr(compare, "Loaded", None)  # no network is built, nothing is scored
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
    images = synthetic.load("test")
    for epochs in (1, 2):
        saved = checkpoint(finished, epochs)
        said = Loaded(saved).model.eval()(data.transform(images.pixels, 48)).argmax(1)
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


# ---------------------------------------------------------------- the features


def normal(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def test_cka_is_one_for_what_did_not_move_and_for_rotated_features():
    x = normal(0, 50, 8)
    rotation, _ = torch.linalg.qr(normal(1, 8, 8))
    assert compare.linear_cka(x, x) == pytest.approx(1)
    assert compare.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)


def test_cka_is_what_its_definition_by_gram_matrices_says():
    x, other = normal(0, 50, 8), normal(2, 50, 8)
    centered, centered_other = x - x.mean(0), other - other.mean(0)
    gram, gram_other = centered @ centered.T, centered_other @ centered_other.T
    expected = ((gram * gram_other).sum() / (gram.norm() * gram_other.norm())).item()
    assert compare.linear_cka(x, other) == pytest.approx(expected)
    assert expected < 0.6


@pytest.fixture
def copied(finished, tmp_path):
    """The longer checkpoint of a copy of that run, to write beside."""
    shutil.copytree(finished, tmp_path / "copied")
    return tmp_path / "copied/epoch2.pt"


def test_how_far_the_features_moved_is_written_beside_the_checkpoint(finished, copied, capsys):
    compare.main([str(copied), "--cka"])
    (row,) = rows(copied.parent / "epoch2.cka.csv")
    pixels, kept = synthetic.load("test").pixels, []
    for model in (Loaded(checkpoint(finished)).model, freeze.build("resnet18", 10)):
        model.fc = torch.nn.Identity()
        with torch.no_grad():
            kept.append(model.eval()(data.transform(pixels, 48)).double())
    assert row["stage"] == "layer4"
    assert float(row["cka"]) == pytest.approx(compare.linear_cka(*kept), abs=1e-5)
    line = f"{float(row['cka']):.4f}    CKA of layer4 with the pretrained one"
    assert line in capsys.readouterr().out


def test_cka_computes_in_the_precision_of_the_training(copied):
    compare.main([str(copied), "--cka"])
    (row,) = rows(copied.parent / "epoch2.cka.csv")
    saved = checkpoint(copied.parent)
    saved["settings"]["precision"] = "bf16"
    torch.save(saved, copied)
    compare.main([str(copied), "--cka"])
    (rounded,) = rows(copied.parent / "epoch2.cka.csv")
    assert rounded["cka"] != row["cka"]
    assert float(rounded["cka"]) == pytest.approx(float(row["cka"]), abs=0.02)


def test_cka_refuses_other_weights_than_those_the_run_began_with(copied, capsys):
    saved = checkpoint(copied.parent)
    saved["settings"]["initial_network"] = "0"
    torch.save(saved, copied)
    line = complaint(compare.main, [copied, "--cka"], capsys)
    assert "none is not what the run began with" in line
    assert not (copied.parent / "epoch2.cka.csv").exists()


def test_cka_looks_for_the_test_set_where_it_is_told(finished, tmp_path, capsys):
    """It scores, so the pictures must be there: a folder that is not is named."""
    saved = checkpoint(finished)
    saved["metadata"]["dataset"] = "folder"
    torch.save(saved, tmp_path / "epoch2.pt")
    nowhere = tmp_path / "nowhere"
    words = [tmp_path / "epoch2.pt", "--cka", "--data-dir", nowhere]
    assert str(nowhere) in complaint(compare.main, words, capsys)
