"""The promises of the design, each broken by at least one plausible mistake."""

import errno
import os
from pathlib import Path

import pytest
import torch
from conftest import checkpoint, history

import data
import features
import freeze
from data import UserError
from plumbing import datasets
from plumbing.files import whole_file
from study import textbook
from study.benchmark import write_pictures

STRATEGIES = [(), ("layer4",), ("layer3", "layer4")]
LOSSES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


def changed(before: dict, after: dict) -> set[str]:
    """Names of the tensors, BatchNorm's buffers included, that are not bit-identical."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def stage_of(name: str) -> str:
    if name.startswith(("conv1", "bn1")):
        return "stem"
    return name.split(".")[0]


# ---------------------------------------------------------------- 1. frozen means frozen


@pytest.mark.parametrize("unfreeze", [*STRATEGIES, ("layer3",), ("stem", "fc")])
def test_frozen_stages_stay_bit_identical_and_the_others_learn(run, unfreeze):
    """Every tensor of a frozen stage, parameters and buffers; and every one of the others moves."""
    rates = []
    if "stem" in unfreeze:
        rates = ["--lr", "stem=1e-3"]  # 1e-8 is lost in rounding a weight of 1
    trained = checkpoint(run("--unfreeze", *unfreeze, *rates))["model"]
    initial = freeze.build("resnet18", 10, seed=0).state_dict()
    learned = {name for name in initial if stage_of(name) in (*unfreeze, "fc")}
    assert changed(initial, trained) == learned


def test_the_usual_mistake_moves_the_frozen_batchnorm_and_nothing_else_that_is_frozen(run):
    trained = checkpoint(run("--frozen-batchnorm", "train", "--epochs", "1"), epochs=1)["model"]
    initial = freeze.build("resnet18", 10, seed=0).state_dict()
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    drifting = {name for name in initial if name.endswith(buffers)}
    assert changed(initial, trained) == drifting | {"fc.weight", "fc.bias"}


# ---------------------------------------------------------------- 2. the cache changes only speed


@pytest.mark.parametrize(
    "unfreeze",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("layer4",),
        pytest.param(("layer3", "layer4"), marks=pytest.mark.slow),
    ],
)
def test_the_same_losses_with_and_without_the_cache(run, float64, unfreeze):
    flags = ["--image-size", "32", "--unfreeze", *unfreeze]
    cached = history(run(*flags, "--cache", "host"), *LOSSES)
    recomputed = history(run(*flags, "--cache", "off"), *LOSSES)
    torch.testing.assert_close(cached, recomputed, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- 3. the textbook computes the same


@pytest.fixture
def pictures(tmp_path) -> Path:
    """60 pictures to train on and 60 to test on, as files."""
    folder = tmp_path / "pictures"
    few = data.stratified_subset(datasets.synthetic("train"), 60, seed=0)
    write_pictures(folder / "train", few)
    write_pictures(folder / "test", datasets.synthetic("test"))
    return folder


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
    [
        pytest.param((), False, marks=pytest.mark.slow),
        (("layer4",), False),
        pytest.param(("layer3", "layer4"), False, marks=pytest.mark.slow),
        pytest.param(("layer4",), True, marks=pytest.mark.slow),
    ],
)
def test_the_same_losses_as_the_textbook_script(run, exact_inputs, pictures, unfreeze, mistake):
    """The same order and flips, PIL pictures one by one, the whole network in every step."""
    flags = ["--dataset", "folder", "--data-dir", str(pictures), "--unfreeze", *unfreeze]
    if mistake:
        flags += ["--frozen-batchnorm", "train"]
    ours = history(run(*flags), *LOSSES)
    usual = textbook.train(
        freeze.build("resnet18", 10, seed=0),
        {stage: freeze.LEARNING_RATES[stage] for stage in [*unfreeze, "fc"]},
        pictures,
        [data.epoch_order(60, 0, epoch) for epoch in (1, 2)],
        image_size=48,
        batch_size=25,
        mistake=mistake,
        workers=0,
    )
    for row, expected in zip(ours, usual, strict=True):
        assert row == pytest.approx([expected[name] for name in LOSSES], rel=1e-6)


# ---------------------------------------------------------------- 4. a run is its settings


def test_the_same_settings_give_the_same_run_and_a_short_run_is_the_start_of_a_long_one(run):
    one = run("--unfreeze", "layer4")
    two = run("--unfreeze", "layer4")
    longer = run("--unfreeze", "layer4", "--epochs", "3")
    assert history(one, *LOSSES) == history(two, *LOSSES) == history(longer, *LOSSES)[:2]
    assert not changed(checkpoint(one)["model"], checkpoint(two)["model"])


def test_a_long_run_leaves_the_short_one_on_its_way(run):
    """What run_all.sh takes its 10 epochs from."""
    alone = run("--unfreeze", "layer4", "--epochs", "1")
    long = run("--unfreeze", "layer4", "--epochs", "3", "1")
    assert alone.name == long.name  # the length is no part of what a run is
    short_alone, short, end = checkpoint(alone, 1), checkpoint(long, 1), checkpoint(long, 3)
    assert not changed(short_alone["model"], short["model"])
    assert short["settings"] == short_alone["settings"] == end["settings"]
    assert len(short["history"]) == 1 and len(end["history"]) == 3
    assert history(alone, *LOSSES) == history(long, *LOSSES)[:1]
    assert [[row[name] for name in LOSSES] for row in short["history"]] == history(alone, *LOSSES)


def test_another_seed_gives_another_run(run):
    assert history(run("--seed", "0"), *LOSSES) != history(run("--seed", "1"), *LOSSES)


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


def test_a_run_that_cannot_save_keeps_both_files_of_before(run, monkeypatch):
    folder = run("--unfreeze", "layer4", "--epochs", "1")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert before.keys() == {"history.csv", "epoch1.pt"}
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> None:
        if "epoch1.pt" not in path.name:
            return write(path, content)
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    expected = f"cannot write .*{folder.name.replace('+', '.')}/epoch1.pt .No space left on device"
    with pytest.raises(UserError, match=expected):
        run("--unfreeze", "layer4", "--epochs", "1", "--out", str(folder.parent))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
