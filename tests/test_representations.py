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


def normal(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def test_cka_is_one_for_what_did_not_move_and_for_rotated_features():
    x = normal(0, 50, 8)
    rotation, _ = torch.linalg.qr(normal(1, 8, 8))
    assert representations.linear_cka(x, x) == pytest.approx(1)
    assert representations.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)


def test_cka_is_what_its_definition_by_gram_matrices_says():
    x, other = normal(0, 50, 8), normal(2, 50, 8)
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
    pixels, kept = datasets.synthetic("test").pixels, []
    for model in (load_model(checkpoint(finished)).model, freeze.build("resnet18", 10)):
        model.fc = torch.nn.Identity()
        with torch.no_grad():
            kept.append(model.eval()(data.transform(pixels, 48)).double())
    assert row["stage"] == "layer4"
    assert float(row["cka"]) == pytest.approx(representations.linear_cka(*kept), abs=1e-5)
    assert f"layer4   CKA {float(row['cka']):.4f}, weights moved by" in capsys.readouterr().out
    before = freeze.build("resnet18", 10).layer4
    after = load_model(checkpoint(finished)).model.layer4
    old = torch.cat([parameter.flatten() for parameter in before.parameters()])
    new = torch.cat([parameter.flatten() for parameter in after.parameters()])
    assert float(row["drift"]) == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-4)


def test_cka_computes_in_the_precision_of_the_training(copied):
    representations.main([str(copied)])
    (row,) = rows(copied.parent / "epoch2.representations.csv")
    saved = checkpoint(copied.parent)
    saved["settings"]["precision"] = "bf16"
    torch.save(saved, copied)
    representations.main([str(copied)])
    (rounded,) = rows(copied.parent / "epoch2.representations.csv")
    assert rounded["cka"] != row["cka"]
    assert float(rounded["cka"]) == pytest.approx(float(row["cka"]), abs=0.02)


def test_cka_refuses_other_weights_than_those_the_run_began_with(copied, capsys):
    saved = checkpoint(copied.parent)
    saved["settings"]["initial_network"] = "0"
    torch.save(saved, copied)
    line = complaint(representations.main, [copied], capsys)
    assert "none is not what the run began with" in line
    assert not (copied.parent / "epoch2.representations.csv").exists()


def test_cka_looks_for_the_test_set_where_it_is_told(finished, tmp_path, capsys):
    """It scores, so the pictures must be there: a folder that is not is named."""
    saved = checkpoint(finished)
    saved["metadata"]["dataset"] = "folder"
    torch.save(saved, tmp_path / "epoch2.pt")
    nowhere = tmp_path / "nowhere"
    words = [tmp_path / "epoch2.pt", "--data-dir", nowhere]
    assert str(nowhere) in complaint(representations.main, words, capsys)
