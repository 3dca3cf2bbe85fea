"""What is told of a run and its pictures."""

from types import SimpleNamespace

import pytest
import torch

import freeze
from data import Images
from plumbing import report

TEN = "abcdefghij"


@pytest.mark.parametrize(
    "classes, counts, expected",
    [
        (["cat", "dog"], [7, 7], "2 classes: cat, dog"),
        (["a", "b", "c"], [7, 2000, 5], "3 classes: a, b, c; from 5 of c to 2,000 of b"),
        (TEN, [1] * 10, f"10 classes: {', '.join(TEN)}"),
        ([*TEN, "k", "l" * 40], [1] * 12, f"12 classes: {', '.join(TEN)} and 2 more"),
    ],
)
def test_the_classes_and_the_smallest_and_largest_are_told(capsys, classes, counts, expected):
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    report.print_classes(Images(torch.zeros(1), labels, tuple(classes)))
    printed = capsys.readouterr().out
    assert " ".join(printed.split()) == expected
    assert all(len(line) <= 80 for line in printed.splitlines())


def test_the_usual_mistake_and_validation_pictures_are_told(capsys):
    few = Images(torch.zeros(3), torch.tensor([0, 1, 0]), ("cat", "dog"))
    images = SimpleNamespace(train=few, train_images=3, watched=lambda: {"val": few, "test": few})
    settings = SimpleNamespace(rates={"fc": 1e-3}, frozen_batchnorm="train", precision="fp32")
    run = SimpleNamespace(folder="here", settings=settings, args=SimpleNamespace(device="auto"))
    report.print_setup(run, freeze.build("resnet18", 10), images, torch.device("cpu"))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == "data 3 train and 3 val and 3 test images"
    assert "layer4 8,393,728 frozen, BatchNorm in train mode" in lines
    assert "fc 5,130 learns at 0.001" in lines and lines[-1].endswith(", fp32, no CUDA GPU")


@pytest.mark.parametrize("seconds, text", [(59, ""), (600, "10 minutes"), (36_000, "10.0 hours")])
def test_after_the_first_epoch_it_says_how_long_the_others_take(capsys, seconds, text):
    report.print_time_left(seconds)
    out = capsys.readouterr().out
    assert text in out and ("--train-size" in out) == (seconds >= 3600)


SIZES = [(224, 128, "cpu", 128), (224, 128, "cuda", 1000), (448, 128, "cuda", 256)]


@pytest.mark.parametrize("size, batch, device, expected", [*SIZES, (224, 16, "cuda", 128)])
def test_a_gpu_tests_larger_batches_but_not_of_larger_pictures(size, batch, device, expected):
    settings = SimpleNamespace(image_size=size, batch_size=batch)
    found = report.test_batch(11_000, settings, torch.device(device))
    assert found == pytest.approx(expected, 0.01)
