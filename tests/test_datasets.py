"""Data sets by name. The only server asked is one on this machine."""

import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import little_cifar, planes
from torchvision import datasets as torchvision_s

from data import UserError
from plumbing import datasets
from plumbing.files import fingerprint

ARCHIVE = "cifar-10-python.tar.gz"
UNPACKED = {f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)}
UNPACKED |= {"cifar-10-batches-py/test_batch", "cifar-10-batches-py/batches.meta"}


@pytest.fixture
def source(monkeypatch, server):
    """CIFAR-10 and CIFAR-100 of a few images, at two mirrors and an official host that all are
    `server`; source.ten and source.hundred are the archives."""
    archives = little_cifar(monkeypatch)
    for dataset in datasets.CIFAR.values():
        monkeypatch.setattr(dataset, "url", f"{server.url}/official/{dataset.filename}")
    mirrors = [f"{server.url}/mirror1", f"{server.url}/mirror2"]
    monkeypatch.setitem(datasets.MIRRORS, "cifar10", mirrors)
    server.ten, server.hundred = archives.values()
    return server


def load(folder: Path, name: str = "cifar10", split: str = "train"):
    return datasets.load(name, split, folder, 224)


def files_in(folder: Path) -> set[str]:
    """Every file in it but the locks, which stay."""
    found = set()
    for root, _, files in os.walk(folder):
        found |= {os.path.relpath(os.path.join(root, file), folder) for file in files}
    return {file for file in found if ".locks" not in Path(file).parts}


def test_cifar_comes_from_the_first_mirror_once(source, tmp_path):
    source.files["/mirror1"] = source.ten
    train, test = (load(tmp_path / "new", split=split) for split in ("train", "test"))
    assert train.pixels.shape == (20, 32, 32, 3) and train.pixels.dtype == torch.uint8
    assert train.labels.tolist() == [0, 1, 2, 3] * 5 and test.labels.tolist() == [3, 2, 1, 0]
    assert train.labels.dtype == torch.int64 and train.classes == tuple("abcdefghij")
    expected = planes(1).reshape(4, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(train.pixels[:4].numpy(), expected) and train.pixels.is_contiguous()
    assert source.asked == ["/mirror1"]


def test_two_runs_that_start_together_download_once(source, tmp_path):
    source.files["/mirror1"] = source.ten
    fetched = []

    def fetch():
        datasets.fetch("cifar10", tmp_path)
        fetched.append(1)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 4 and source.asked == ["/mirror1"]
    assert files_in(tmp_path) == {ARCHIVE}


def test_a_data_dir_that_cannot_be_is_not_blamed_on_the_servers(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=str(tmp_path / "file")) as failure:
        load(tmp_path / "file")
    assert "mirror" not in str(failure.value) and not source.asked


def test_cifar_100_comes_from_the_official_host(source, tmp_path):
    source.files["/official/cifar-100-python.tar.gz"] = source.hundred
    train = load(tmp_path, "cifar100")
    assert train.labels.tolist() == [9, 8, 7, 6] and len(train.classes) == 100


@pytest.mark.parametrize("fault", ["missing", "wrong bytes", "cut", "silent"])
def test_a_mirror_that_fails_is_passed_over(source, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(datasets, "TIMEOUT_SECONDS", 0.5)
    before = socket.getdefaulttimeout()
    if fault != "missing":
        source.files["/mirror1"] = source.ten
    if fault == "wrong bytes":
        source.files["/mirror1"] = b"<html>a login page</html>"
    if fault == "cut":
        source.cut.add("/mirror1")
    if fault == "silent":
        source.silent.add("/mirror1")
    source.files["/mirror2"] = source.ten
    assert len(load(tmp_path).labels) == 20
    assert source.asked == ["/mirror1", "/mirror2"]
    assert files_in(tmp_path) == UNPACKED | {ARCHIVE}
    assert socket.getdefaulttimeout() == before


def test_all_sources_failing_says_which_and_what_to_do_and_leaves_nothing(source, tmp_path):
    source.files["/mirror2"] = source.ten
    source.cut.add("/mirror2")
    with pytest.raises(UserError) as failure:
        load(tmp_path / "new")
    message = str(failure.value)
    for part in (
        "/mirror1: HTTP Error 404",
        "/mirror2: ",
        f"/official/{ARCHIVE}: HTTP Error 404",
        f"Put that file (md5 {torchvision_s.CIFAR10.tgz_md5}) into {tmp_path / 'new'}",
        "--dataset synthetic",
    ):
        assert part in message
    assert "\n" not in message and files_in(tmp_path) == set()


def test_an_archive_put_there_by_hand_is_used(source, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(source.ten)
    assert len(load(tmp_path).labels) == 20 and not source.asked
    batch = tmp_path / "cifar-10-batches-py/data_batch_1"
    batch.write_bytes(batch.read_bytes()[:100])  # an unpacking cut short: unpacked again
    assert len(load(tmp_path).labels) == 20 and not source.asked


def test_a_damaged_archive_is_replaced(source, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(source.ten[:500])
    source.files["/mirror1"] = source.ten
    assert len(load(tmp_path).labels) == 20 and source.asked == ["/mirror1"]
    assert (tmp_path / ARCHIVE).read_bytes() == source.ten


def test_unpacked_files_need_no_archive(source, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(source.ten)
    load(tmp_path)
    (tmp_path / ARCHIVE).unlink()
    assert len(load(tmp_path).labels) == 20 and not source.asked


def test_what_is_written_when_a_download_is_interrupted_is_removed(source, tmp_path, monkeypatch):
    def interrupted(url: str, part: str, *_, **__):
        Path(part).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.hub, "download_url_to_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path)
    assert files_in(tmp_path) == set()


# ---------------------------------------------------------------- both splits, and the next ones


def test_the_last_test_set_is_kept_for_the_next_checkpoint(monkeypatch, tmp_path, capsys):
    asked = []

    def loaded(*key):
        asked.append(key)
        return datasets.synthetic("test")

    monkeypatch.setattr(datasets, "load", loaded)
    once = datasets.TestSets()
    metadata = {"dataset": "folder", "data_dir": str(tmp_path)}
    metadata |= {"test_share": 0.2, "picture_size": [32, 32]}
    images = datasets.synthetic("test")
    settings = {
        "test_seed": 0,
        "classes": ("a", "b"),
        "test_data": fingerprint(images.pixels, images.labels),
    }
    one = {"metadata": metadata, "settings": settings | {"image_size": 64}}
    other = {"metadata": metadata, "settings": settings | {"image_size": 96}}
    assert once.of(one) is once.of(one)
    once.of(other)
    once.of(one)
    assert "warning" not in capsys.readouterr().out
    once.of(one, tmp_path / "moved")
    sizes = [key[3] for key in asked]
    assert sizes == [64, 96, 64, 64] and asked[-1][2] == tmp_path / "moved"
    assert asked[0] == ("folder", "test", tmp_path, 64, ("a", "b"), 0.2, 0, [32, 32])


def test_other_test_pictures_than_the_run_s_own_are_said_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(datasets, "load", lambda *_: datasets.synthetic("test"))
    metadata = {"dataset": "folder", "data_dir": str(tmp_path), "test_share": None}
    metadata["picture_size"] = [32, 32]
    settings = {
        "test_seed": 0,
        "image_size": 64,
        "classes": ("a", "b"),
        "test_data": "other pictures",
    }
    datasets.TestSets().of({"metadata": metadata, "settings": settings})
    assert "not the test pictures that the run was tested on" in capsys.readouterr().out
