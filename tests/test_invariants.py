"""The promises of the design, each broken by at least one plausible mistake."""

import os
from pathlib import Path

import pytest
import torch
from conftest import checkpoint, history, slow

import data
import features
import freeze
from plumbing import datasets
from plumbing.files import whole_file
from study import textbook
from study.benchmark import write_pictures

LOSSES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def changed(before: dict, after: dict) -> set[str]:
    """Names of the tensors, BatchNorm's buffers included, that are not bit-identical."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture
def few(tmp_path) -> list[str]:
    """Flags of small runs on 12 pictures, tested on 10 others."""
    folder = tmp_path / "pictures"
    for split, count in (("train", 12), ("test", 10)):
        images = data.stratified_subset(datasets.synthetic(split), count, seed=0)
        write_pictures(folder / split, images)
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--train-size", "12"]
    return [*flags, "--batch-size", "5", "--image-size", "40"]


# ---------------------------------------------------------------- 1. frozen means frozen


@pytest.mark.parametrize(
    "unfreeze, flags",
    [
        slow([], []),
        (["layer4"], []),
        slow(["layer3", "layer4"], []),
        (["layer3"], []),
        slow(["stem", "fc"], ["--lr", "stem=1e-3"]),  # 1e-8 is lost in rounding a weight of 1
        ([], ["--frozen-batchnorm", "train"]),  # the usual mistake
    ],
)
def test_frozen_stages_stay_bit_identical_and_all_of_the_others_moves(run, few, unfreeze, flags):
    folder = run("--unfreeze", *unfreeze, *flags, "--epochs", "1", *few)
    initial = freeze.build("resnet18", 10, seed=0).state_dict()
    learned = set()
    for name in initial:
        stage = name.split(".")[0].replace("conv1", "stem").replace("bn1", "stem")
        drifts = "--frozen-batchnorm" in flags and name.endswith(BUFFERS)
        if stage in (*unfreeze, "fc") or drifts:
            learned.add(name)
    assert changed(initial, checkpoint(folder, epochs=1)["model"]) == learned


# ---------------------------------------------------------------- 2. the cache changes only speed


@pytest.mark.parametrize(
    "unfreeze, cache",
    [(["layer4"], "host"), slow([], "disk"), slow(["layer3", "layer4"], "host")],
)
def test_the_same_losses_with_and_without_the_cache(run, few, float64, unfreeze, cache):
    folder = run(*few, "--unfreeze", *unfreeze, "--cache", cache)
    assert {file.name for file in folder.iterdir()} == {"history.csv", "epoch2.pt"}
    recomputed = history(run(*few, "--unfreeze", *unfreeze, "--cache", "off"), *LOSSES)
    torch.testing.assert_close(history(folder, *LOSSES), recomputed, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- 3. the textbook computes the same


def exact(images: torch.Tensor) -> torch.Tensor:
    """Normalized images [..., 3, H, W] in float64, each value one of the 256 levels that it stands
    for: the rounding of float32, in which both scripts normalize, grows to 1e-4 of the loss."""
    mean = torch.tensor(data.IMAGENET_MEAN, dtype=torch.float64).view(3, 1, 1)
    deviation = torch.tensor(data.IMAGENET_STD, dtype=torch.float64).view(3, 1, 1)
    levels = ((images * deviation + mean) * 255).round()
    rounded = (levels / 255 - mean) / deviation
    torch.testing.assert_close(rounded, images.double(), rtol=0, atol=2e-6)
    return rounded


@pytest.fixture
def exact_inputs(float64, monkeypatch):
    ours, usual = features.transform, textbook.Pictures.__getitem__

    def exact_item(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = usual(self, index)
        return exact(image), label

    monkeypatch.setattr(features, "transform", lambda *args: exact(ours(*args)))
    monkeypatch.setattr(textbook.Pictures, "__getitem__", exact_item)


@pytest.mark.parametrize(
    "unfreeze, mistake",
    [(["layer4"], False), slow([], False), slow(["layer3", "layer4"], False), slow([], True)],
)
def test_the_same_losses_as_the_textbook_script(run, few, exact_inputs, unfreeze, mistake):
    """The same order and flips, PIL pictures one by one, the whole network in every step."""
    mode = "train" if mistake else "eval"
    folder = run(*few, "--unfreeze", *unfreeze, "--frozen-batchnorm", mode)
    usual = textbook.train(
        freeze.build("resnet18", 10, seed=0),
        {stage: freeze.LEARNING_RATES[stage] for stage in [*unfreeze, "fc"]},
        Path(few[3]),
        [data.epoch_order(12, 0, epoch) for epoch in (1, 2)],
        image_size=40,
        batch_size=5,
        mistake=mistake,
        workers=0,
    )
    for row, expected in zip(history(folder, *LOSSES), usual, strict=True):
        assert row == pytest.approx([expected[name] for name in LOSSES], rel=1e-6)


# ---------------------------------------------------------------- 4. a run is its settings


def test_a_run_is_a_function_of_its_settings_and_a_short_one_the_start_of_a_long_one(run, few):
    flags = [*few, "--unfreeze", "layer4", "--epochs"]
    alone, long = run(*flags, "1"), run(*flags, "2", "1")
    assert alone.name == long.name  # the length is no part of what a run is
    short_alone, short, end = checkpoint(alone, 1), checkpoint(long, 1), checkpoint(long, 2)
    assert not changed(short_alone["model"], short["model"])
    assert short["settings"] == short_alone["settings"] == end["settings"]
    assert len(short["history"]) == 1 and len(end["history"]) == 2
    assert history(alone, *LOSSES) == history(long, *LOSSES)[:1]
    assert [[row[name] for name in LOSSES] for row in short["history"]] == history(alone, *LOSSES)
    other = run(*flags, "1", "--seed", "1")
    assert history(other, *LOSSES) != history(alone, *LOSSES)


# ---------------------------------------------------------------- 5. a file is whole or not there


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "history.csv"
    file.write_text("old")
    with pytest.raises(RuntimeError), whole_file(file) as part:
        part.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["history.csv"]
    with whole_file(file) as part:
        part.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["history.csv"]
