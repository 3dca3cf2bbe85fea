"""What only a CUDA device can show: pytest -m cuda. Written on machines without one, skipped there."""

import pytest
import torch
from conftest import checkpoint, history

import data
import evaluate
import train

pytestmark = pytest.mark.cuda
LOSSES = ("train_loss", "test_loss")


def test_the_transform_is_the_cpu_s():
    pixels = data.synthetic("test").pixels
    flips = torch.arange(len(pixels)) % 2 == 0
    on_device = data.transform(pixels.cuda(), 224, flips=flips.cuda()).cpu()
    torch.testing.assert_close(on_device, data.transform(pixels, 224, flips=flips), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [28, 56, 112])
def test_the_transform_rounds_as_pil_does_from_any_size(size):
    pixels = torch.randint(0, 256, (8, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    on_device = data.transform(pixels.cuda(), 224).cpu()
    wrong = (on_device - data.transform(pixels, 224)).abs() > 1e-4
    assert wrong.float().mean() < 1e-3


@pytest.mark.parametrize("unfreeze", [["layer4"], []])
def test_every_place_of_the_cache_gives_the_same_losses(run, unfreeze):
    device, host, off = (history(run("--device", "cuda", "--unfreeze", *unfreeze, "--cache", place), *LOSSES)
                         for place in ("device", "host", "off"))
    torch.testing.assert_close(device, host, rtol=1e-2, atol=0)
    torch.testing.assert_close(device, off, rtol=1e-2, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_device_learns_what_the_cpu_learns_and_evaluation_agrees(run, precision, tmp_path):
    flags = ["--unfreeze", "layer4", "--precision", precision]
    cpu, cuda = run("--device", "cpu", *flags), run("--device", "cuda", *flags)
    torch.testing.assert_close(history(cpu, *LOSSES), history(cuda, *LOSSES), rtol=5e-2, atol=0)
    evaluate.main([str(cuda / "checkpoint.pt"), "--csv", str(tmp_path / "summary.csv")])
    accuracy = float((tmp_path / "summary.csv").read_text().splitlines()[1].split(",")[7])
    assert abs(accuracy - history(cuda, "test_accuracy")[-1][0]) * 60 < 1.5
    assert checkpoint(cuda)["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_replayed_run_is_the_ordinary_run(run, monkeypatch, precision):
    """CUDA graphs change the launching, not the sums: 60 images in batches of 25 have an odd last batch."""
    flags = ["--device", "cuda", "--unfreeze", "layer4", "--precision", precision, "--epochs", "5"]
    replayed = run(*flags)
    monkeypatch.setattr(train, "Replayed", lambda step: step)
    torch.testing.assert_close(history(replayed, *LOSSES), history(run(*flags), *LOSSES),
                               rtol=1e-2 if precision == "fp32" else 1e-1, atol=0)


def test_a_run_resumed_on_the_device_ends_as_the_uninterrupted_one(run, tmp_path):
    flags = ["--device", "cuda", "--unfreeze", "layer4", "--precision", "fp32"]
    whole = run(*flags, "--epochs", "4")
    out = str(tmp_path / "parts")
    run(*flags, "--epochs", "2", "--out", out)
    parts = run(*flags, "--epochs", "2", "4", "--out", out, "--resume")
    torch.testing.assert_close(history(whole, *LOSSES), history(parts, *LOSSES), rtol=1e-2, atol=0)
