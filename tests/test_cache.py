"""Where the features are kept, and what is found there later."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import history

import freeze
from data import UserError
from features import Features
from plumbing import cache, drawn, files, machine
from plumbing.cache import ROOM, choose, fill_all

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = Path("features")
GB = 10**9
LITTLE = ("--unfreeze", "layer4", "--image-size", "33", "--train-size", "24", "--epochs", "1")
LITTLE += ("--batch-size", "12")


@pytest.fixture
def images():
    return drawn.synthetic("test").pixels[:20]


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.features"))


def parts(folder: Path) -> list[Path]:
    return list(folder.glob(".*.part"))


# ---------------------------------------------------------------- on disk


@functools.cache
def network(seed: int) -> torch.nn.Module:
    return freeze.build("resnet18", 10, seed=seed)


def features_of(images, seed=0, size=48, dtype=torch.float32, mirrored=True) -> Features:
    prefix, _ = freeze.split(network(seed), "layer4")
    return Features(prefix, images, size, CPU, dtype, mirrored)


def on_disk(images, folder: Path, **other) -> tuple[Features, int]:
    """Features kept in `folder`, and how many were computed."""
    inputs = features_of(images, **other)
    place, computed = fill_all([inputs], "disk", CPU, folder)
    assert place == "disk"
    return inputs, computed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_on_disk_is_found_again_and_is_what_was_computed(images, tmp_path, dtype):
    first, computed = on_disk(images, tmp_path / "features", dtype=dtype)
    (file,) = stored(tmp_path / "features")
    assert computed == 40 and file.stat().st_size == first.bytes
    again, computed = on_disk(images, tmp_path / "features", dtype=dtype)
    assert computed == 0 and torch.equal(again.store, first.store)
    again.fill(CPU)
    assert torch.equal(again.store, first.store)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"size": 64}, {"dtype": torch.bfloat16}, {"mirrored": False}]
)
def test_what_is_on_disk_is_not_found_by_who_needs_something_else(images, tmp_path, other):
    on_disk(images, tmp_path)
    assert on_disk(images, tmp_path, **other)[1] > 0 and len(stored(tmp_path)) == 2
    assert on_disk(255 - images, tmp_path)[1] > 0 and len(stored(tmp_path)) == 3


DAMAGE = {
    "cut": lambda content: content[:-4],
    "zeros": lambda content: bytes(len(content)),
    "not numbers": lambda content: b"\xff" * len(content),
    "backwards": lambda content: content[::-1],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_computed_again(images, tmp_path, damage):
    first, _ = on_disk(images, tmp_path)
    expected = first.store.clone()
    (file,) = stored(tmp_path)
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    again, computed = on_disk(images, tmp_path)
    assert computed == 40 and torch.equal(again.store, expected)
    assert stored(tmp_path) == [file] and not parts(tmp_path)


def test_what_killed_fills_left_is_removed_and_what_is_being_written_is_not(images, tmp_path):
    """Before the room is measured, which it takes."""
    left = tmp_path / ".1234.features.99.part"
    left.write_bytes(bytes(10**6))
    with (
        files.locked(tmp_path, "5678.features"),
        files.whole_file(tmp_path / "5678.features") as part,
    ):
        part.write_bytes(bytes(10))
        choose("disk", [features_of(images)], CPU, tmp_path)
        assert not left.exists() and part.exists()


def test_a_fill_that_is_interrupted_leaves_no_file(images, tmp_path, monkeypatch):
    def blocks(*_):
        yield torch.zeros(16, 3, 3, 256)
        raise ZeroDivisionError

    monkeypatch.setattr(Features, "blocks", blocks)
    with pytest.raises(ZeroDivisionError):
        on_disk(images, tmp_path)
    assert not stored(tmp_path) and not parts(tmp_path)


def test_a_disk_that_cannot_be_written_to_is_named(images, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        on_disk(images, tmp_path / "file")


def test_a_run_with_the_cache_on_disk_is_the_run_without_and_says_what_it_reuses(run, capsys):
    plain, first = run(*LITTLE), run(*LITTLE, "--cache", "disk")
    whose = f"kept for later runs; to delete: rm -r {first.parent}/features"
    assert whose in capsys.readouterr().out
    second = run(*LITTLE, "--cache", "disk", "--lr", "fc=0.1", "--out", str(first.parent))
    out = capsys.readouterr().out
    assert "computed by an earlier run" in out and "filled in" not in out
    losses = "train_loss", "test_loss"
    assert history(plain, *losses) == history(first, *losses) != history(second, *losses)


# ---------------------------------------------------------------- where it goes


def need(amount: int, stages: int = 4) -> SimpleNamespace:
    return SimpleNamespace(bytes=amount, prefix=[None] * stages)


def free(monkeypatch, **amounts) -> None:
    """So much is free, in bytes by place."""
    monkeypatch.setattr(cache, "free_memory", lambda place, *_: amounts[place])


@pytest.mark.parametrize(
    "device, host, wanted, place",
    [
        (80 * GB, 100 * GB, "auto", "device"),
        (10 * GB, 100 * GB, "auto", "host"),
        (10 * GB + ROOM - 1, 100 * GB, "auto", "host"),
        (10 * GB + ROOM, 0, "auto", "device"),
        (10 * GB, 10 * GB, "auto", "off"),
        (80 * GB, 100 * GB, "host", "host"),
        (80 * GB, 100 * GB, "off", "off"),
    ],
)
def test_where_the_cache_goes(monkeypatch, device, host, wanted, place):
    free(monkeypatch, device=device, host=host)
    chosen, why = choose(wanted, [need(8 * GB), need(2 * GB)], CUDA, HERE)
    assert chosen == place and "10.00 GB of features" in why and place in why


@pytest.mark.parametrize("wanted", ["device", "host"])
def test_a_place_that_was_asked_for_and_is_too_small(monkeypatch, wanted):
    free(monkeypatch, device=3 * GB, host=3 * GB)
    says = f"--cache {wanted}: 10.00 GB of features .*3.0 GB free in {wanted} memory.*--train-size"
    with pytest.raises(UserError, match=says):
        choose(wanted, [need(10 * GB)], CUDA, HERE)


@pytest.mark.parametrize("device", [CPU, torch.device("mps")])
def test_what_has_no_memory_of_its_own_uses_the_host_s(monkeypatch, device):
    free(monkeypatch, host=80 * GB)
    assert choose("auto", [need(10 * GB)], device, HERE)[0] == "host"


def test_without_a_prefix_there_is_nothing_to_keep(monkeypatch):
    free(monkeypatch, host=80 * GB)
    assert choose("auto", [need(GB, stages=0)], CPU, HERE)[0] == "off"


def test_where_nobody_knows_what_is_free_it_is_tried_and_said(monkeypatch):
    free(monkeypatch, host=None)
    place, why = choose("auto", [need(10 * GB)], CPU, HERE)
    assert place == "host" and "not known" in why


def test_a_disk_with_too_little_room_is_told_before_anything_is_written(
    images, monkeypatch, tmp_path
):
    inputs, _ = on_disk(images, tmp_path / "there")
    new = tmp_path / "not/yet"
    usage = SimpleNamespace(free=ROOM // 8)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    says = f"--cache disk: .* and 0.3 GB to spare do not fit .*0.3 GB free in {new}"
    with pytest.raises(UserError, match=says):
        choose("disk", [inputs], CPU, new)
    assert not (tmp_path / "not").exists()
    usage.free = 0
    assert choose("disk", [inputs], CPU, tmp_path / "there")[0] == "disk"  # it is there already


# ---------------------------------------------------------------- what does not fit after all


class Full:
    """Features that no memory holds: the device says so, and then the host."""

    bytes, prefix = 10, [None]

    def __init__(self):
        self.tried, self.store = [], None

    def fill(self, device: torch.device, report=None) -> None:
        self.tried.append(device.type)
        self.store = torch.empty(1)
        if device.type == "cuda":
            raise torch.OutOfMemoryError
        torch.empty(2**60)  # what the CPU's allocator raises is a plain RuntimeError


def test_from_the_device_to_the_host_to_nowhere(monkeypatch, capsys):
    free(monkeypatch, device=2**40, host=2**40)
    features = Full()
    assert fill_all([features], "device", CUDA, HERE) == ("off", 0)
    assert features.tried == ["cuda", "cpu"] and features.store is None
    first, second = capsys.readouterr().out.splitlines()
    assert "--cache device" in first and first.endswith("host")
    assert "--cache host" in second and second.endswith("off")


def test_another_error_is_not_taken_for_a_full_memory():
    class Broken(Full):
        def fill(self, *_):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        fill_all([Broken()], "host", CPU, HERE)


def test_a_run_whose_cache_does_not_fit_after_all_is_the_same_run(run, monkeypatch, capsys):
    losses = "train_loss", "train_accuracy", "test_loss", "test_accuracy"
    expected = history(run(*LITTLE), *losses)
    for error in (torch.OutOfMemoryError, MemoryError):

        def full(self, *_, error=error):
            self.store = torch.empty(1)
            raise error

        monkeypatch.setattr(Features, "fill", full)
        found = history(run(*LITTLE), *losses)
        assert "does not fit after all (--cache host): off" in capsys.readouterr().out
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=0.02)
