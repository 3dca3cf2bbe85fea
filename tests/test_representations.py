"""How far the features and the weights moved."""

import shutil

import pytest
import torch
from conftest import checkpoint, complaint, rows

import data
import freeze
from plumbing import datasets
from plumbing.weights import load_model
from study import representations


def test_cka_is_one_for_what_is_rotated_and_else_what_its_gram_matrices_say():
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 50, 8, dtype=torch.float64, generator=generator)
    rotation, _ = torch.linalg.qr(other[:8])
    assert representations.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    centered, centered_other = x - x.mean(0), other - other.mean(0)
    gram, gram_other = centered @ centered.T, centered_other @ centered_other.T
    expected = ((gram * gram_other).sum() / (gram.norm() * gram_other.norm())).item()
    assert representations.linear_cka(x, other) == pytest.approx(expected)
    assert expected < 0.6


@pytest.fixture
def copied(finished, tmp_path):
    """The longer checkpoint of a copy of that run, to write beside."""
    shutil.copytree(finished, tmp_path / "copied")
    return tmp_path / "copied/epoch2.pt"


def test_how_far_the_features_moved_is_written_beside_the_checkpoint(finished, copied, capsys):
    representations.main([str(copied)])
    (row,) = rows(copied.parent / "epoch2.representations.csv")
    pixels, features, layers = datasets.synthetic("test").pixels, [], []
    for model in (load_model(checkpoint(finished)).model, freeze.build("resnet18", 10)):
        model.fc = torch.nn.Identity()
        with torch.no_grad():
            features.append(model.eval()(data.transform(pixels, 48)).double())
            layers.append(torch.cat([part.flatten() for part in model.layer4.parameters()]))
    assert row["stage"] == "layer4"
    assert float(row["cka"]) == pytest.approx(representations.linear_cka(*features), abs=1e-5)
    assert f"layer4   CKA {float(row['cka']):.4f}, weights moved by" in capsys.readouterr().out
    moved = (layers[0] - layers[1]).norm() / layers[1].norm()
    assert float(row["drift"]) == pytest.approx(moved.item(), rel=1e-4)


def test_cka_computes_in_the_precision_of_the_training(copied):
    values = []
    for precision in ("fp32", "bf16"):
        saved = checkpoint(copied.parent)
        saved["settings"]["precision"] = precision
        torch.save(saved, copied)
        representations.main([str(copied)])
        values += [float(row["cka"]) for row in rows(copied.with_suffix(".representations.csv"))]
    assert values[0] != values[1] == pytest.approx(values[0], abs=0.02)


def test_cka_refuses_other_weights_than_those_the_run_began_with(copied, capsys):
    saved = checkpoint(copied.parent)
    saved["settings"]["initial_network"] = "0"
    torch.save(saved, copied)
    line = complaint(representations.main, [copied], capsys)
    assert "none is not what the run began with" in line
    assert not copied.with_suffix(".representations.csv").exists()


def test_cka_looks_for_the_test_set_where_it_is_told(copied, tmp_path, capsys):
    saved = checkpoint(copied.parent)
    saved["metadata"]["dataset"] = "folder"
    torch.save(saved, copied)
    words = [copied, "--data-dir", tmp_path / "nowhere"]
    assert str(tmp_path / "nowhere") in complaint(representations.main, words, capsys)
