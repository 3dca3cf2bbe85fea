"""Where the features are kept."""

import functools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import history

import data
import freeze
from data import UserError
from features import Features
from plumbing import cache, datasets
from plumbing.cache import FREE_BYTES, FREE_DISK_BYTES

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = Path("features")
GB, MB = 10**9, 10**6
LITTLE = ("--unfreeze", "layer4", "--image-size", "33", "--train-size", "24", "--epochs", "1")
LITTLE += ("--batch-size", "12")
USUAL = SimpleNamespace(image_size=224, batch_size=128)
LOSSES = "train_loss", "train_accuracy", "test_loss", "test_accuracy"


@pytest.fixture
def images():
    return datasets.synthetic("test").pixels[:20]


@functools.cache
def network(seed: int) -> torch.nn.Module:
    return freeze.build("resnet18", 10, seed=seed)


def features_of(images, dtype=torch.float32, mirrored=True, augment=None) -> Features:
    prefix, _ = freeze.split(network(0), "layer4")
    return Features(prefix, images, 48, CPU, dtype, mirrored, augment)


def keep(inputs: dict, wanted: str = "auto", device=CPU, folder=HERE, settings=USUAL) -> dict:
    return cache.keep(inputs, wanted, device, folder, settings)[0]


def free(monkeypatch, **amounts) -> None:
    """So much is free, in bytes by place."""
    monkeypatch.setattr(cache, "free_memory", lambda place, *_: amounts[place])


# ---------------------------------------------------------------- in a file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_in_a_file_is_what_was_computed_and_the_file_is_gone(images, tmp_path, dtype):
    inputs = features_of(images, dtype)
    kept = keep({"train": inputs}, "disk", folder=tmp_path / "new")["train"]
    assert sys.platform == "win32" or not os.listdir(tmp_path / "new")
    in_memory = features_of(images, dtype)
    in_memory.fill(CPU)
    assert torch.equal(kept.store, in_memory.store) and kept.store.dtype == dtype


def test_a_fill_that_is_interrupted_leaves_no_file(images, tmp_path, monkeypatch):
    inputs = features_of(images)
    monkeypatch.setattr(Features, "compute", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        keep({"train": inputs}, "disk", folder=tmp_path)
    assert not os.listdir(tmp_path)


def test_a_disk_that_is_full_after_all_is_given_up(images, tmp_path, monkeypatch, capsys):
    inputs = features_of(images)

    class Full(type(open(os.devnull, "wb"))):  # noqa: SIM115
        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", lambda file, mode: Full(open_(file, mode).detach()))
    assert keep({"train": inputs}, "disk", folder=tmp_path)["train"].store is None
    out = capsys.readouterr().out
    assert "it does not fit in a file after all" in out and "computed" not in os.listdir(tmp_path)


open_ = open


def test_a_run_with_the_cache_in_a_file_is_the_run_without(run):
    plain, in_a_file = run(*LITTLE), run(*LITTLE, "--cache", "disk")
    assert history(plain, *LOSSES) == history(in_a_file, *LOSSES)
    assert {file.name for file in in_a_file.iterdir()} == {"history.csv", "epoch1.pt"}


# ---------------------------------------------------------------- where it goes


class Fake:
    """Features of so many images, of which each takes so many bytes; notes where they are kept."""

    def __init__(self, images: int, each: int, stages: int = 4, augment=None, full=()):
        self.pixels, self.bytes, self.shape = torch.zeros(images, 1), images * each, (images,)
        self.prefix, self.augment, self.store, self.full = [None] * stages, augment, None, full

    def __len__(self) -> int:
        return len(self.pixels)

    def fill(self, device, progress) -> None:
        if device.type in self.full:
            raise MemoryError
        self.store = SimpleNamespace(is_cuda=device.type == "cuda")


def places(kept) -> dict[str, int]:
    """How many images of some features are where."""
    found = {}
    for part in getattr(kept, "pieces", [kept]):
        place = "off"
        if part.store:
            place = "device" if part.store.is_cuda else "host"
        found[place] = len(part)
    return found


@pytest.mark.parametrize(
    "device, host, train, test",
    [
        (80 * GB, 100 * GB, {"device": 8000}, {"device": 2000}),
        (10 * GB + FREE_BYTES, 0, {"device": 8000}, {"device": 2000}),
        (10 * GB + FREE_BYTES - 1, 100 * GB, {"device": 7999, "host": 1}, {"device": 2000}),
        (FREE_BYTES, 100 * GB, {"host": 8000}, {"host": 2000}),
        (
            3 * GB + FREE_BYTES,
            4 * GB + FREE_BYTES,
            {"device": 1000, "host": 4000, "off": 3000},
            {"device": 2000},
        ),
        (GB + FREE_BYTES, 0, {"off": 8000}, {"device": 1000, "off": 1000}),
        (0, FREE_BYTES, {"off": 8000}, {"off": 2000}),
        (None, None, {"device": 8000}, {"device": 2000}),
    ],
)
def test_test_pictures_first_the_device_first_and_the_rest_elsewhere(
    monkeypatch, capsys, device, host, train, test
):
    free(monkeypatch, device=device, host=host)
    kept = keep({"train": Fake(8000, MB), "test": Fake(2000, MB)}, device=CUDA)
    assert places(kept["train"]) == train and places(kept["test"]) == test
    out = capsys.readouterr().out
    assert ("they do not fit" in out) == ("off" in {*train, *test})


def test_on_a_cpu_what_does_not_fit_on_the_host_goes_into_a_file(images, monkeypatch, tmp_path):
    """A disk is slower than a GPU computes, and faster than a CPU does."""
    inputs = {"train": features_of(images), "test": features_of(images[:4], mirrored=False)}
    one = inputs["test"].bytes // 4
    free(monkeypatch, host=FREE_BYTES + 4 * one + 10 * 2 * one, disk=FREE_DISK_BYTES + 6 * 2 * one)
    kept = keep(inputs, folder=tmp_path)
    assert [len(part) for part in kept["train"].pieces] == [10, 6, 4]
    assert [part.store is None for part in kept["train"].pieces] == [False, False, True]
    assert len(kept["test"].store) == 4
    whole = features_of(images)
    whole.fill(CPU)
    order, flips = data.epoch_order(20, 0, 1)
    for ours, expected in zip(
        kept["train"].batches(8, order, flips), whole.batches(8, order, flips)
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted, word", [("host", "in host memory"), ("disk", "in a file")])
def test_a_place_that_was_asked_for_and_is_too_small_is_refused(monkeypatch, wanted, word):
    free(monkeypatch, host=GB, disk=GB)
    with pytest.raises(UserError, match=f"--cache {wanted}: 10.00 GB.*1.0 GB free {word}.*--cache"):
        keep({"train": Fake(10_000, MB)}, wanted)


def test_larger_pictures_and_batches_leave_more_room_for_training(monkeypatch):
    free(monkeypatch, host=10 * GB + FREE_BYTES, disk=0)
    for settings in (
        SimpleNamespace(image_size=448, batch_size=128),
        SimpleNamespace(image_size=224, batch_size=512),
    ):
        kept = keep({"train": Fake(10_000, MB)}, settings=settings)["train"]
        rest = -(-3 * FREE_BYTES // MB)
        assert places(kept) == {"host": 10_000 - rest, "off": rest}


def test_what_is_asked_to_be_off_or_is_never_the_same_is_not_kept(monkeypatch, capsys):
    free(monkeypatch, host=100 * GB, disk=0)
    both = {"train": Fake(9, MB), "test": Fake(3, MB)}
    assert [part.store for part in keep(both, "off").values()] == [None, None]
    assert "cache    off for 0.01 GB of features of 12 images: as asked" in capsys.readouterr().out
    nothing_frozen = {"train": Fake(9, MB, stages=0), "test": Fake(3, MB, stages=0)}
    assert [part.store for part in keep(nothing_frozen).values()] == [None, None]
    assert "cache    off: no stage's output stays the same" in capsys.readouterr().out
    kept = keep({"train": Fake(9, MB, augment=data.random_crop), "test": Fake(3, MB)})
    assert kept["train"].store is None and kept["test"].store is not None
    out = capsys.readouterr().out
    assert "0.00 GB of features of 3 of 12 images in host memory" in out
    assert "not of training pictures: AUGMENT changes them in every epoch" in out


# ---------------------------------------------------------------- when it is full after all


def test_a_place_that_is_full_after_all_is_given_up_for_the_next(monkeypatch, capsys):
    free(monkeypatch, device=100 * GB, host=100 * GB)
    kept = keep({"train": Fake(9, MB, full=("cuda",)), "test": Fake(3, MB)}, device=CUDA)
    assert places(kept["train"]) == {"host": 9} and places(kept["test"]) == {"device": 3}
    assert "it does not fit in device memory after all" in capsys.readouterr().out


def test_another_error_is_not_taken_for_a_full_memory(monkeypatch):
    free(monkeypatch, host=100 * GB, disk=0)

    class Broken(Fake):
        def fill(self, *_):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        keep({"train": Broken(1, MB)})


def test_a_run_whose_cache_does_not_fit_after_all_is_the_same_run(run, monkeypatch, capsys):
    expected = history(run(*LITTLE), *LOSSES)

    def full(self, *_):
        raise MemoryError

    monkeypatch.setattr(Features, "fill", full)
    monkeypatch.setattr(cache, "usable_places", lambda *_: ["host"])
    found = history(run(*LITTLE), *LOSSES)
    assert "it does not fit in host memory after all" in capsys.readouterr().out
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0.02)


def test_a_run_with_a_split_cache_is_the_run_without(run, monkeypatch, capsys):
    expected = history(run(*LITTLE), *LOSSES)
    free(monkeypatch, host=FREE_BYTES + 60_000 * 4, disk=0)
    found = history(run(*LITTLE), *LOSSES)
    assert " images in host memory" in capsys.readouterr().out
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0.02)
