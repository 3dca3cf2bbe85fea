"""What only a CUDA device can show: pytest -m cuda. Skipped where there is none."""

import pytest
import torch
from conftest import checkpoint, history, rows

import data
import evaluate
import features
import train
from plumbing import cache, synthetic

pytestmark = pytest.mark.cuda
LOSSES = ("train_loss", "test_loss")


def test_the_transform_is_the_cpu_s():
    pixels = synthetic.load("test").pixels
    flips = torch.arange(len(pixels)) % 2 == 0
    on_device = data.transform(pixels.cuda(), 224, flips=flips.cuda()).cpu()
    expected = data.transform(pixels, 224, flips=flips)
    torch.testing.assert_close(on_device, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [28, 56, 112])
def test_the_transform_rounds_as_pil_does_from_any_size(size):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, size, size, 3), dtype=torch.uint8, generator=generator)
    on_device = data.transform(pixels.cuda(), 224).cpu()
    wrong = (on_device - data.transform(pixels, 224)).abs() > 1e-4
    assert wrong.float().mean() < 1e-3


@pytest.mark.parametrize("unfreeze", [["layer4"], []])
def test_every_place_of_the_cache_gives_the_same_losses(run, unfreeze):
    losses = {}
    for place in ("device", "host", "off"):
        flags = ["--device", "cuda", "--unfreeze", *unfreeze, "--cache", place]
        losses[place] = history(run(*flags), *LOSSES)
    torch.testing.assert_close(losses["device"], losses["host"], rtol=1e-2, atol=0)
    torch.testing.assert_close(losses["device"], losses["off"], rtol=1e-2, atol=0)


def test_a_cache_split_over_places_gives_the_same_losses(run, monkeypatch, capsys):
    """features.SMALL_BYTES: pixels stay on the host, as those of many pictures do."""
    flags = ["--device", "cuda", "--unfreeze", "layer4"]
    expected = history(run(*flags), *LOSSES)
    monkeypatch.setattr(features, "SMALL_BYTES", 0)
    for device, host in [(2**19, 2**19), (2**19, 0), (0, 2**19)]:
        free = {"device": cache.FREE_BYTES + device, "host": cache.FREE_BYTES + host}
        monkeypatch.setattr(cache, "free_memory", lambda place, *_, free=free: free[place])
        found = history(run(*flags), *LOSSES)
        assert "computed in every epoch" in capsys.readouterr().out
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_device_learns_what_the_cpu_learns_and_evaluation_agrees(run, precision, tmp_path):
    flags = ["--unfreeze", "layer4", "--precision", precision]
    cpu, cuda = run("--device", "cpu", *flags), run("--device", "cuda", *flags)
    expected, found = history(cpu, *LOSSES), history(cuda, *LOSSES)
    torch.testing.assert_close(expected, found, rtol=5e-2, atol=0)
    evaluate.main([str(cuda / "epoch2.pt"), "--csv", str(tmp_path / "summary.csv")])
    (scored,) = rows(tmp_path / "summary.csv")
    logged = history(cuda, "test_accuracy")[-1][0]
    assert abs(float(scored["test_accuracy"]) - logged) * 60 < 1.5
    assert scored["device"] == torch.cuda.get_device_name()
    assert checkpoint(cuda)["metadata"]["device_type"] == "cuda"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_replayed_run_is_the_ordinary_run(run, monkeypatch, precision):
    """CUDA graphs change the launching, not the sums: 60 images in batches of 25 have an odd
    last batch."""
    flags = ["--device", "cuda", "--unfreeze", "layer4", "--precision", precision, "--epochs", "5"]
    replayed = history(run(*flags), *LOSSES)
    monkeypatch.setattr(train, "Replayed", lambda step: step)
    ordinary = history(run(*flags), *LOSSES)
    tolerance = {"fp32": 1e-2}.get(precision, 1e-1)
    torch.testing.assert_close(replayed, ordinary, rtol=tolerance, atol=0)


def test_a_run_resumed_on_the_device_ends_as_the_uninterrupted_one(run, tmp_path):
    flags = ["--device", "cuda", "--unfreeze", "layer4", "--precision", "fp32"]
    whole = run(*flags, "--epochs", "4")
    out = str(tmp_path / "parts")
    run(*flags, "--epochs", "2", "--out", out)
    parts = run(*flags, "--epochs", "2", "4", "--out", out, "--resume")
    assert {file.name for file in parts.iterdir()} == {"history.csv", "epoch2.pt", "epoch4.pt"}
    expected, found = history(whole, *LOSSES), history(parts, *LOSSES)
    torch.testing.assert_close(expected, found, rtol=1e-2, atol=0)
