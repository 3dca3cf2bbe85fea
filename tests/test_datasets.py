"""Data sets by name. The only server asked is one on this machine."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_data import little_cifar

from data import Images, UserError
from plumbing import datasets, files
from plumbing.datasets import synthetic  # before conftest.py makes it draw fewer
from plumbing.files import fingerprint

ARCHIVE = "cifar-10-python.tar.gz"


@pytest.fixture
def source(monkeypatch, server):
    """CIFAR-10 and CIFAR-100 of a few images, at two mirrors and an official host that all are
    `server`; source.ten and source.hundred are the archives."""
    server.ten, server.hundred = little_cifar(monkeypatch)
    names = {datasets.Zenodo: "mirror1", datasets.BrainChip: "mirror2"}
    for sources in datasets.SOURCES.values():
        for dataset in sources:
            name = names.get(dataset, f"official/{dataset.filename}")
            monkeypatch.setattr(dataset, "url", f"{server.url}/{name}")
    return server


def load(folder: Path, name: str = "cifar10"):
    return datasets.load(name, "train", folder, 224)


def test_two_runs_that_start_together_download_once_from_the_first_mirror(source, tmp_path):
    source.files["/mirror1"] = source.ten
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load, [tmp_path / "new"] * 4))
    assert source.asked == ["/mirror1"] * 2  # torchvision asks first where the address leads
    assert load(tmp_path / "new").labels.tolist() == [0, 1, 2, 3] * 5
    assert datasets.load("cifar10", "test", tmp_path / "new", 224).labels.tolist() == [3, 2, 1, 0]
    assert len(source.asked) == 2


def test_cifar_100_comes_from_the_official_host(source, tmp_path):
    source.files["/official/cifar-100-python.tar.gz"] = source.hundred
    train = load(tmp_path, "cifar100")
    assert train.labels.tolist() == [9, 8, 7, 6] and len(train.classes) == 100


@pytest.mark.parametrize("fault", ["missing", "wrong bytes", "cut", "silent"])
def test_a_mirror_that_fails_is_passed_over(source, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(files, "TIMEOUT_SECONDS", 0.5)
    contents = {"missing": None, "wrong bytes": b"<html>a login page</html>"}
    source.files = {"/mirror1": contents.get(fault, source.ten), "/mirror2": source.ten}
    if fault == "cut":
        source.cut.add("/mirror1")
    if fault == "silent":
        source.silent.add("/mirror1")  # for ten seconds
    started = time.monotonic()
    assert len(load(tmp_path).labels) == 20
    assert time.monotonic() - started < 8
    assert list(dict.fromkeys(source.asked)) == ["/mirror1", "/mirror2"]
    assert socket.getdefaulttimeout() is None


def test_all_sources_failing_says_which_and_what_to_do(source, tmp_path):
    source.files["/mirror2"] = source.ten
    source.cut.add("/mirror2")
    expected = "/mirror1: HTTP Error 404.*/mirror2: File not found or corrupted"
    expected += f".*/official/{ARCHIVE}: HTTP Error 404"
    expected += f".*Put that file .md5 {datasets.CIFAR10.tgz_md5}. into {tmp_path / 'new'}"
    with pytest.raises(UserError, match=f"{expected}.*--dataset synthetic"):  # in one line
        load(tmp_path / "new")


def test_what_is_there_is_used_and_what_is_damaged_is_made_anew(source, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(source.ten)  # by hand
    assert len(load(tmp_path).labels) == 20
    batch = tmp_path / "cifar-10-batches-py/data_batch_1"
    batch.write_bytes(batch.read_bytes()[:100])  # an unpacking cut short
    assert len(load(tmp_path).labels) == 20
    (tmp_path / ARCHIVE).unlink()  # unpacked files need no archive
    assert len(load(tmp_path).labels) == 20 and not source.asked
    batch.unlink()
    (tmp_path / ARCHIVE).write_bytes(source.ten[:500])
    source.files["/mirror1"] = source.ten
    assert len(load(tmp_path).labels) == 20 and set(source.asked) == {"/mirror1"}


def test_a_picture_folder_is_no_place_to_download_cifar_to(source, tmp_path):
    (tmp_path / "Training").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path}.*--dataset folder was probably meant"):
        load(tmp_path)
    assert not source.asked


def test_the_last_test_set_is_kept_for_the_next_checkpoint(monkeypatch, capsys):
    images, asked = synthetic("test"), []
    monkeypatch.setattr(datasets, "load", lambda *key: asked.append(key) or images)
    metadata = {"dataset": "folder", "data_dir": "here", "test_share": 0.2, "picture_size": [9, 9]}
    settings = {"test_seed": 0, "classes": ("a", "b"), "image_size": 64}
    settings["test_data"] = fingerprint(images.pixels, images.labels)
    one = {"metadata": metadata, "settings": settings}
    sets = datasets.TestSets()
    for checkpoint in (one, one, {"metadata": metadata, "settings": settings | {"image_size": 96}}):
        assert sets.of(checkpoint) is images
    expected = "folder", "test", Path("here"), 64, ("a", "b"), 0.2, 0, [9, 9]
    assert asked == [expected, (*expected[:3], 96, *expected[4:])]
    assert "warning" not in capsys.readouterr().out
    settings["test_data"] = "other pictures"
    sets.of(one)
    assert "not the test pictures that the run was tested on" in capsys.readouterr().out


def other(split: str) -> Images:
    return datasets.load("synthetic-other", split, Path(), 32)


@pytest.mark.parametrize("draw, mean", [(synthetic, 140.43), (other, 126.26)])
def test_drawn_pictures_are_always_the_same_and_no_colour_gives_a_class_away(draw, mean):
    """Published losses depend on them."""
    train, test = draw("train"), draw("test")
    assert test.pixels[-1].float().mean().item() == pytest.approx(mean, abs=0.02)
    assert torch.equal(draw("test").pixels, test.pixels)
    assert train.pixels.shape == (2000, 32, 32, 3) and train.pixels.dtype == torch.uint8
    assert torch.bincount(train.labels).tolist() == [200] * 10 and len(train.classes) == 10
    assert torch.bincount(test.labels).tolist() == [50] * 10 and test.classes == train.classes
    pictures = [pixels.numpy().tobytes() for pixels in (*train.pixels, *test.pixels)]
    assert len(set(pictures)) == 2500
    colours = train.pixels.float().mean((1, 2))
    of_classes = torch.stack([colours[train.labels == label].mean(0) for label in range(10)])
    assert of_classes.std(0).max() < 0.3 * colours.std(0).min()
