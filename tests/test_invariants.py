"""The five promises of the design, each broken by at least one plausible mistake."""

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import checkpoint, history
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import data
import freeze

STRATEGIES = [(), ("layer4",), ("layer3", "layer4")]
LOSSES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


def changed(before: dict, after: dict) -> set[str]:
    """Names of the tensors, BatchNorm's buffers included, that are not bit-identical."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def stage_of(name: str) -> str:
    return "stem" if name.startswith(("conv1", "bn1")) else name.split(".")[0]


# ---------------------------------------------------------------- 1. frozen means frozen


@pytest.mark.parametrize("unfreeze", [*STRATEGIES, ("layer3",), ("stem", "fc")])
def test_frozen_stages_stay_bit_identical_and_the_others_learn(run, unfreeze):
    rates = ["--lr", "stem=1e-3"] if "stem" in unfreeze else []  # 1e-8 is lost in rounding a weight of 1
    trained = checkpoint(run("--unfreeze", *unfreeze, *rates))["model"]
    initial = freeze.build(10, seed=0).state_dict()
    learned = {name for name in initial if stage_of(name) in (*unfreeze, "fc")}
    assert changed(initial, trained) == learned


@pytest.mark.parametrize("right", [True, False])
def test_the_usual_mistake_is_caught(right):
    """requires_grad = False and model.train(): the frozen BatchNorm's statistics drift."""
    model = freeze.build(10)
    freeze.freeze(model, ["fc"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze.train_mode(model, ["fc"]) if right else model.train()
    model(torch.rand(4, 3, 64, 64))
    drifted = changed(before, model.state_dict())
    assert bool(drifted) != right and all("running" in name or "tracked" in name for name in drifted)


# ---------------------------------------------------------------- 2. the cache changes nothing but the speed


@pytest.mark.parametrize("unfreeze", STRATEGIES)
def test_the_same_losses_with_and_without_the_cache(run, float64, unfreeze):
    cached, recomputed = (history(run("--unfreeze", *unfreeze, "--cache", place), *LOSSES) for place in ("host", "off"))
    torch.testing.assert_close(cached, recomputed, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- 3. the fast path is the textbook's


class TextbookDataset(Dataset):
    """PIL images through torchvision's transforms, one by one, mirrored as the epoch says."""

    def __init__(self, images: data.Images, size: int, flips: torch.Tensor | None = None):
        self.images, self.flips = images, flips
        self.prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
        self.resize = transforms.Resize((size, size))

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        picture = self.resize(Image.fromarray(self.images.pixels[i].numpy()))
        if self.flips is not None and self.flips[i]:
            picture = transforms.functional.hflip(picture)
        return self.prepare(picture), int(self.images.labels[i])


def textbook(unfreeze: tuple[str, ...], epochs: int = 2, size: int = 48, batch_size: int = 25,
             mistake: bool = False) -> list[list[float]]:
    """The experiment as a tutorial would write it, with the frozen stages in eval mode or by mistake in train mode."""
    train = data.stratified_subset(data.synthetic("train"), 60, seed=0)
    test = data.synthetic("test")
    model = freeze.build(10, seed=0)
    learning = {"layer3": model.layer3, "layer4": model.layer4, "fc": model.fc}
    rates = {"layer3": 1e-5, "layer4": 1e-4, "fc": 1e-3}
    names = [*unfreeze, "fc"]
    for parameter in model.parameters():
        parameter.requires_grad = False
    for name in names:
        learning[name].requires_grad_(True)
    optimizer = torch.optim.Adam([{"params": learning[name].parameters(), "lr": rates[name]} for name in names])
    results = []
    for epoch in range(1, epochs + 1):
        model.train(mistake)
        for name in names:
            learning[name].train()
        order, flips = data.epoch_order(60, 0, epoch)
        total = right = 0
        for x, y in DataLoader(TextbookDataset(train, size, flips), batch_size, sampler=order.tolist()):
            optimizer.zero_grad()
            logits = model(x.double())
            loss = F.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
            right += (logits.argmax(1) == y).sum().item()
        row = [total / 60, right / 60]
        model.eval()
        total = right = 0
        with torch.no_grad():
            for x, y in DataLoader(TextbookDataset(test, size), 100):
                logits = model(x.double())
                total += F.cross_entropy(logits, y, reduction="sum").item()
                right += (logits.argmax(1) == y).sum().item()
        results.append([*row, total / len(test.labels), right / len(test.labels)])
    return results


@pytest.mark.parametrize("unfreeze, mistake", [*((stages, False) for stages in STRATEGIES), (("layer4",), True)])
def test_the_same_losses_as_a_textbook_loop(run, float64, unfreeze, mistake):
    ours = history(run("--unfreeze", *unfreeze, *(["--frozen-batchnorm", "train"] if mistake else [])), *LOSSES)
    for row, expected in zip(ours, textbook(unfreeze, mistake=mistake), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- 4. a run is a function of its arguments


def test_the_same_arguments_give_the_same_run_and_a_short_run_is_the_start_of_a_long_one(run):
    one, two, longer = run("--unfreeze", "layer4"), run("--unfreeze", "layer4"), run("--unfreeze", "layer4", "--epochs", "3")
    assert history(one, *LOSSES) == history(two, *LOSSES) == history(longer, *LOSSES)[:2]
    assert not changed(checkpoint(one)["model"], checkpoint(two)["model"])


def test_a_long_run_leaves_the_short_one_on_its_way(run):
    """What run_all.sh takes its 10 epochs from."""
    alone = run("--unfreeze", "layer4", "--epochs", "1")
    long = run("--unfreeze", "layer4", "--epochs", "3", "1")
    short = long.parent / alone.name
    assert history(alone, *LOSSES) == history(short, *LOSSES) == history(long, *LOSSES)[:1]
    assert not changed(checkpoint(alone)["model"], checkpoint(short)["model"])
    assert checkpoint(short)["settings"] == checkpoint(alone)["settings"] == checkpoint(long)["settings"]
    assert len(checkpoint(short)["history"]) == 1 and len(checkpoint(long)["history"]) == 3


def test_another_seed_gives_another_run(run):
    assert history(run("--seed", "0"), *LOSSES) != history(run("--seed", "1"), *LOSSES)


def test_order_and_flips_come_from_seed_and_epoch_alone():
    order, flips = data.epoch_order(1000, seed=3, epoch=7)
    torch.manual_seed(99)
    again = data.epoch_order(1000, seed=3, epoch=7)
    assert torch.equal(order, again[0]) and torch.equal(flips, again[1])
    assert sorted(order.tolist()) == list(range(1000)) and 400 < flips.sum() < 600
    for other in (data.epoch_order(1000, 3, 8), data.epoch_order(1000, 4, 7), data.epoch_order(1000, 7, 3)):
        assert not torch.equal(order, other[0]) and not torch.equal(flips, other[1])


# ---------------------------------------------------------------- 5. a file appears whole or not at all


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "history.csv"
    file.write_text("old")
    with pytest.raises(RuntimeError), data.whole_file(file) as part:
        part.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["history.csv"]
    with data.whole_file(file) as part:
        part.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["history.csv"]


def test_a_run_stopped_while_it_saves_keeps_both_files_of_the_epoch_before(run, monkeypatch, tmp_path):
    folder = run("--unfreeze", "layer4", "--epochs", "1")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert before.keys() == {"history.csv", "checkpoint.pt"}
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> None:
        write(path, content[:len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=f"cannot write {folder}/checkpoint.pt .No space left on device.: what was there"):
        run("--unfreeze", "layer4", "--epochs", "1", "--out", str(folder.parent))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
