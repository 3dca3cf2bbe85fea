"""What is told of a run and its pictures."""

from types import SimpleNamespace

import pytest
import torch

import freeze
from data import Images
from plumbing import report


def told(capsys, classes: list[str], counts: list[int]) -> str:
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    report.print_classes(Images(torch.zeros(1), labels, tuple(classes)))
    return " ".join(capsys.readouterr().out.split())


def test_the_classes_and_the_smallest_and_largest_are_told(capsys):
    text = told(capsys, ["cat", "dog", "fox"], [7, 2000, 5])
    assert text == "3 classes: cat, dog, fox; from 5 of fox to 2,000 of dog"
    assert told(capsys, ["cat", "dog"], [7, 7]) == "2 classes: cat, dog"


def test_of_many_classes_ten_are_named(capsys):
    names = [f"class{number}" for number in range(12)]
    assert told(capsys, names, [1] * 12) == f"12 classes: {', '.join(names[:10])} and 2 more"
    assert told(capsys, names[:10], [1] * 10) == f"10 classes: {', '.join(names[:10])}"


@pytest.mark.parametrize("mistake", [False, True])
def test_every_stage_is_told_with_its_rate_or_as_frozen(capsys, mistake):
    few = Images(torch.zeros(3), torch.tensor([0, 1, 0]), ("cat", "dog"))
    images = SimpleNamespace(train=few, train_images=3, watched=lambda: {"val": few, "test": few})
    settings = SimpleNamespace(
        rates={"layer4": 1e-4, "fc": 1e-3},
        frozen_batchnorm={False: "eval", True: "train"}[mistake],
        precision="fp32",
    )
    run = SimpleNamespace(folder="here", settings=settings, args=SimpleNamespace(device="auto"))
    report.print_setup(run, freeze.build("resnet18", 10), images, torch.device("cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "data     3 train and 3 val and 3 test images"
    stages = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines[4:10]}
    frozen = {False: "frozen", True: "frozen, BatchNorm in train mode"}[mistake]
    assert list(stages) == freeze.stage_names("resnet18")
    assert stages["layer4"] == ["8,393,728", "learns at 0.0001"]
    assert stages["fc"] == ["5,130", "learns at 0.001"]
    assert stages["stem"] == ["9,536", frozen] and stages["layer3"][1] == frozen
    assert lines[-1].endswith(", fp32, no CUDA GPU")


@pytest.mark.parametrize(
    "seconds, text",
    [(59, ""), (600, "about 10 minutes to go"), (36_000, "about 10 hours to go")],
)
def test_after_the_first_epoch_it_says_how_long_the_others_take(capsys, seconds, text):
    report.print_time_left(seconds)
    out = capsys.readouterr().out
    assert text in out and ("--train-size" in out) == (seconds >= 3600)
