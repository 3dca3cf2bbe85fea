"""How far the features and the weights moved."""

from pathlib import Path

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
def changed(finished, tmp_path):
    """changed("settings", precision="bf16"): a copy of the longer checkpoint, with that changed."""

    def changed(part: str, **values) -> Path:
        saved = checkpoint(finished)
        saved[part] |= values
        torch.save(saved, tmp_path / "epoch2.pt")
        return tmp_path / "epoch2.pt"

    return changed


def test_how_far_the_features_moved_is_written_beside_the_checkpoint(changed, capsys, monkeypatch):
    """In the precision of the training."""
    images = data.stratified_subset(datasets.synthetic("test"), 12, seed=0)
    monkeypatch.setattr(datasets, "synthetic", lambda _: images)
    copied = changed("settings")
    representations.main([str(copied)])
    (row,) = rows(copied.with_suffix(".representations.csv"))
    features, layers = [], []
    for model in (load_model(checkpoint(copied.parent)).model, freeze.build("resnet18", 10)):
        model.fc = torch.nn.Identity()
        with torch.no_grad():
            features.append(model.eval()(data.transform(images.pixels, 48)).double())
            layers.append(torch.cat([part.flatten() for part in model.layer4.parameters()]))
    cka = float(row["cka"])
    assert row["stage"] == "layer4"
    assert cka == pytest.approx(representations.linear_cka(*features), abs=1e-5)
    assert f"layer4   CKA {cka:.4f}, weights moved by" in capsys.readouterr().out
    moved = (layers[0] - layers[1]).norm() / layers[1].norm()
    assert float(row["drift"]) == pytest.approx(moved.item(), rel=1e-4)
    representations.main([str(changed("settings", precision="bf16"))])
    (row,) = rows(copied.with_suffix(".representations.csv"))
    assert cka != float(row["cka"]) == pytest.approx(cka, abs=0.02)


def test_cka_refuses_other_weights_than_those_the_run_began_with(changed, capsys):
    copied = changed("settings", initial_network="0")
    line = complaint(representations.main, [copied], capsys)
    assert "none is not what the run began with" in line
    assert not copied.with_suffix(".representations.csv").exists()


def test_cka_looks_for_the_test_set_where_it_is_told(changed, tmp_path, capsys):
    words = [changed("metadata", dataset="folder"), "--data-dir", tmp_path / "nowhere"]
    assert str(tmp_path / "nowhere") in complaint(representations.main, words, capsys)
