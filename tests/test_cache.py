"""Where the features are kept."""

import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import data
from data import UserError
from features import Features
from plumbing import cache, datasets
from plumbing.cache import FREE_BATCHES, FREE_BYTES, FREE_DISK_BYTES

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB, MB = 10**9, 10**6  # Fake's 1 MB of features an image takes batches that are not too large
USUAL = SimpleNamespace(image_size=224, batch_size=32)


def features_of(count: int, dtype=torch.float32, mirrored: bool = True) -> Features:
    pixels = datasets.synthetic("test").pixels[:count]
    return Features(nn.AvgPool2d(16), pixels, 48, CPU, dtype, mirrored)


def keep(inputs: dict, wanted="auto", device=CPU, folder=Path("features"), settings=USUAL) -> dict:
    return cache.keep(inputs, wanted, device, folder, settings)[0]


def free(monkeypatch, **amounts) -> None:
    """So much is free, in bytes by place."""
    monkeypatch.setattr(cache, "free_memory", lambda place, *_: amounts[place])


def test_an_interrupted_fill_leaves_no_file_and_a_full_disk_is_left(tmp_path, monkeypatch, capsys):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    inputs = {"train": features_of(4)}
    for error in (RuntimeError("mat1 and mat2 shapes"), FileNotFoundError(2, "No such file")):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(Features, "compute", Mock(side_effect=error))
            keep(inputs, "disk", folder=tmp_path)
        assert not os.listdir(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    assert keep(inputs, "disk", folder=tmp_path)["train"].store is None
    assert "it does not fit in a file after all" in capsys.readouterr().out
    assert not os.listdir(tmp_path)


class Fake:
    """Features of so many images, 1 MB each; `store` is the kind of device they are kept on."""

    def __init__(self, images: int, prefix=(None,), augment=None, full=""):
        self.pixels, self.bytes, self.shape = torch.zeros(images, 1), images * MB, (images,)
        self.prefix, self.augment, self.full, self.store = prefix, augment, full, None

    def __len__(self) -> int:
        return len(self.pixels)

    def fill(self, device, *_) -> None:
        if device.type == self.full:
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


SOME = {"device": 1000, "host": 4000, "off": 3000}


@pytest.mark.parametrize(
    "device, host, train, test",
    [
        (10 * GB + FREE_BYTES, 0, {"device": 8000}, {"device": 2000}),
        (10 * GB + FREE_BYTES - 1, 100 * GB, {"device": 7999, "host": 1}, {"device": 2000}),
        (FREE_BYTES, 100 * GB, {"host": 8000}, {"host": 2000}),
        (3 * GB + FREE_BYTES, 4 * GB + FREE_BYTES, SOME, {"device": 2000}),
        (GB + FREE_BYTES, 0, {"off": 8000}, {"device": 1000, "off": 1000}),
        (None, None, {"device": 8000}, {"device": 2000}),
    ],
)
def test_test_pictures_and_the_device_come_first(monkeypatch, capsys, device, host, train, test):
    free(monkeypatch, device=device, host=host)
    kept = keep({"train": Fake(8000), "test": Fake(2000)}, device=CUDA)
    assert places(kept["train"]) == train and places(kept["test"]) == test
    out = capsys.readouterr().out
    assert ("they do not fit" in out) == ("off" in {*train, *test})
    assert ("how much is free is not known" in out) == (device is None)


def test_a_split_cache_gives_what_a_whole_one_gives(monkeypatch, tmp_path):
    """On a CPU the host and a file; a disk is slower than a GPU computes, faster than a CPU."""
    dtype, folder = torch.bfloat16, tmp_path / "new"
    inputs = {"train": features_of(20, dtype), "test": features_of(4, dtype, mirrored=False)}
    one = inputs["test"].bytes // 4
    free(monkeypatch, host=FREE_BYTES + 4 * one + 10 * 2 * one, disk=FREE_DISK_BYTES + 6 * 2 * one)
    kept = keep(inputs, folder=folder)
    assert not os.listdir(folder)  # the file has no name any more
    assert [len(part) for part in kept["train"].pieces] == [10, 6, 4]
    assert [part.store is None for part in kept["train"].pieces] == [False, False, True]
    assert len(kept["test"].store) == 4
    whole = features_of(20, dtype)
    whole.fill(CPU)
    for given in (data.epoch_order(20, 0, 1), ()):
        for ours, expected in zip(kept["train"].batches(8, *given), whole.batches(8, *given)):
            torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("wanted, word", [("host", "in host memory"), ("disk", "in a file")])
def test_a_place_that_was_asked_for_and_is_too_small_is_refused(monkeypatch, wanted, word):
    free(monkeypatch, host=GB, disk=GB)
    with pytest.raises(UserError, match=f"--cache {wanted}: 10.00 GB.*1.0 GB free {word}.*--cache"):
        keep({"train": Fake(10_000)}, wanted)


@pytest.mark.parametrize(
    "size, batch, spare", [(448, 256, 8 * FREE_BYTES), (32, 128, 128 * FREE_BATCHES * MB)]
)
def test_larger_pictures_batches_and_features_leave_more_room(monkeypatch, size, batch, spare):
    free(monkeypatch, host=10 * GB + spare - 1, disk=0)
    settings = SimpleNamespace(image_size=size, batch_size=batch)
    kept = keep({"train": Fake(10_000)}, settings=settings)["train"]
    assert places(kept) == {"host": 9_999, "off": 1}


@pytest.mark.parametrize(
    "wanted, train, test, kept, line",
    [
        ("off", {}, {}, [], "cache    off for 0.01 GB of features of 12 images: as asked"),
        ("auto", {"prefix": ()}, {"prefix": ()}, [], "off: no stage's output stays the same"),
        ("auto", {"augment": data.random_crop}, {}, ["test"], "not of training pictures: AUGMENT"),
        ("auto", {"augment": data.random_crop}, {}, ["test"], "features of 3 of 12 images in host"),
        ("auto", {}, {}, ["train", "test"], "0.01 GB of features in host memory, 100.0 GB were"),
    ],
)
def test_what_is_kept_is_said(monkeypatch, capsys, wanted, train, test, kept, line):
    free(monkeypatch, host=100 * GB, disk=0)
    found = keep({"train": Fake(9, **train), "test": Fake(3, **test)}, wanted)
    assert [name for name in found if found[name].store] == kept
    assert line in capsys.readouterr().out


def test_a_memory_that_is_full_after_all_is_given_up_for_the_next(monkeypatch, capsys):
    free(monkeypatch, device=100 * GB, host=100 * GB)
    kept = keep({"train": Fake(9, full="cuda"), "test": Fake(3)}, device=CUDA)
    assert places(kept["train"]) == {"host": 9} and places(kept["test"]) == {"device": 3}
    assert "it does not fit in device memory after all" in capsys.readouterr().out
