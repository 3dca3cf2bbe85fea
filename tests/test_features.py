"""Where the prefix's outputs are kept, and that looking one up is computing it."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import features
import freeze
import machine
from conftest import history
from features import ROOM, Features, choose_place

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = Path("features")
GB = 10**9


@pytest.fixture
def images():
    return data.synthetic("test").pixels[:20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unfrozen", [["fc"], ["layer4", "fc"], ["layer3", "fc"]])
def test_a_lookup_gives_what_computing_gives(images, unfrozen, dtype):
    prefix, _ = freeze.split(freeze.build(10), unfrozen)
    inputs = Features(prefix, images, 48, CPU, dtype, mirrored=True)
    indices, flips = torch.tensor([3, 19, 3, 0]), torch.tensor([True, False, False, True])
    computed = inputs(indices, flips), inputs(indices)
    estimate = inputs.bytes
    assert inputs.fill("host", HERE) == 40 and not HERE.exists()
    assert inputs.store.nbytes == estimate and inputs.store.dtype == dtype  # known before it is allocated
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for found, expected in zip((inputs(indices, flips), inputs(indices)), computed):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(inputs(indices[:1], flips[:1]), inputs(indices[:1], ~flips[:1]))


def test_a_filled_cache_does_not_run_the_prefix_again(images):
    prefix, _ = freeze.split(freeze.build(10), ["layer4", "fc"])
    inputs = Features(prefix, images, 48, CPU, torch.float32, mirrored=False)
    inputs.fill("device", HERE)
    inputs.prefix = None
    assert inputs(torch.tensor([0, 1])).shape == (2, 256, 3, 3)


@pytest.mark.parametrize("place", ["host", "off"])
def test_batches_are_lookups_in_order(images, place):
    prefix, _ = freeze.split(freeze.build(10), ["layer4", "fc"])
    inputs = Features(prefix, images, 48, CPU, torch.float32, mirrored=True)
    inputs.fill(place, HERE)
    order, flips = data.epoch_order(20, 0, 1)
    batches = list(inputs.batches(8, order, flips))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    torch.testing.assert_close(torch.cat(batches), inputs(order, flips[order]))
    torch.testing.assert_close(torch.cat(list(inputs.batches(8))), inputs(torch.arange(20)))


# ---------------------------------------------------------------- on disk


def on_disk(images, folder: Path, seed: int = 0, size: int = 48, dtype=torch.float32, mirrored: bool = True):
    prefix, _ = freeze.split(freeze.build(10, seed=seed), ["layer4", "fc"])
    inputs = Features(prefix, images, size, CPU, dtype, mirrored)
    return inputs, inputs.fill("disk", folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_on_disk_is_found_again_and_is_what_was_computed(images, tmp_path, dtype):
    first, computed = on_disk(images, tmp_path / "features", dtype=dtype)
    assert computed == 40 and [file.stat().st_size for file in (tmp_path / "features").iterdir()] == [first.bytes]
    again, computed = on_disk(images, tmp_path / "features", dtype=dtype)
    assert computed == 0 and torch.equal(again.store, first.store)
    again.fill("host", HERE)
    assert torch.equal(again.store, first.store)


@pytest.mark.parametrize("other", [dict(seed=1), dict(size=64), dict(dtype=torch.bfloat16), dict(mirrored=False)])
def test_what_is_on_disk_is_not_found_by_who_needs_something_else(images, tmp_path, other):
    on_disk(images, tmp_path)
    assert on_disk(images, tmp_path, **other)[1] > 0 and len(list(tmp_path.iterdir())) == 2
    assert on_disk(255 - images, tmp_path)[1] > 0 and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", [
    lambda file: file.write_bytes(file.read_bytes()[:-4]),
    lambda file: file.write_bytes(bytes(file.stat().st_size)),
    lambda file: file.write_bytes(b"\xff" * file.stat().st_size),  # NaN
    lambda file: file.write_bytes(file.read_bytes()[::-1]),
])
def test_a_damaged_file_is_computed_again(images, tmp_path, damage):
    first, _ = on_disk(images, tmp_path)
    expected = first.store.clone()
    (file,) = tmp_path.iterdir()
    damage(file)
    again, computed = on_disk(images, tmp_path)
    assert computed == 40 and torch.equal(again.store, expected) and list(tmp_path.iterdir()) == [file]


def test_what_killed_fills_left_is_removed_and_what_is_being_written_is_not(images, tmp_path, monkeypatch):
    left = tmp_path / ".1234.features.99.part"
    left.write_bytes(bytes(10**6))
    inputs, _ = on_disk(images, tmp_path / "elsewhere")
    with data.whole_file(tmp_path / "5678.features") as part:
        choose_place("disk", [inputs], CPU, tmp_path)
        assert not left.exists() and part.exists()


def test_a_fill_that_is_interrupted_leaves_no_file(images, tmp_path, monkeypatch):
    monkeypatch.setattr(Features, "blocks", lambda self: iter([(0, torch.zeros(16, 3, 3, 256)), 1 / 0]))
    with pytest.raises(ZeroDivisionError):
        on_disk(images, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_with_the_cache_on_disk_is_the_run_without_and_says_what_it_reuses(run, capsys):
    plain, first = run("--unfreeze", "layer4"), run("--unfreeze", "layer4", "--cache", "disk")
    assert f"kept for later runs; to delete: rm -r {first.parent}/features" in capsys.readouterr().out
    second = run("--unfreeze", "layer4", "--cache", "disk", "--lr", "fc=0.1", "--out", str(first.parent))
    out = capsys.readouterr().out
    assert "computed by an earlier run" in out and "filled in" not in out
    losses = "train_loss", "test_loss"
    assert history(plain, *losses) == history(first, *losses) != history(second, *losses)


# ---------------------------------------------------------------- where it goes


def need(bytes: int, stages: int = 4) -> SimpleNamespace:
    return SimpleNamespace(bytes=bytes, prefix=[None] * stages)


@pytest.mark.parametrize("device, host, wanted, place", [
    (80 * GB, 100 * GB, "auto", "device"),
    (10 * GB, 100 * GB, "auto", "host"),
    (10 * GB + ROOM - 1, 100 * GB, "auto", "host"),
    (10 * GB + ROOM, 0, "auto", "device"),
    (10 * GB, 10 * GB, "auto", "off"),
    (80 * GB, 100 * GB, "host", "host"),
    (80 * GB, 100 * GB, "off", "off"),
])
def test_where_the_cache_goes(monkeypatch, device, host, wanted, place):
    monkeypatch.setattr(features, "free_memory", lambda where, *_: {"device": device, "host": host}[where])
    chosen, why = choose_place(wanted, [need(8 * GB), need(2 * GB)], CUDA, HERE)
    assert chosen == place and "10.00 GB of features" in why and place in why


@pytest.mark.parametrize("wanted", ["device", "host"])
def test_a_place_that_was_asked_for_and_is_too_small(monkeypatch, wanted):
    monkeypatch.setattr(features, "free_memory", lambda *_: 3 * GB)
    with pytest.raises(ValueError, match=f"--cache {wanted}: 10.00 GB of features .*3.0 GB free in {wanted} memory.*--train-size"):
        choose_place(wanted, [need(10 * GB)], CUDA, HERE)


@pytest.mark.parametrize("device", [CPU, torch.device("mps")])
def test_what_has_no_memory_of_its_own_uses_the_host_s(monkeypatch, device):
    monkeypatch.setattr(features, "free_memory", lambda *_: 80 * GB)
    assert choose_place("auto", [need(10 * GB)], device, HERE)[0] == "host"


def test_without_a_prefix_there_is_nothing_to_keep(monkeypatch):
    monkeypatch.setattr(features, "free_memory", lambda *_: 80 * GB)
    assert choose_place("auto", [need(GB, stages=0)], CPU, HERE)[0] == "off"


def test_a_disk_with_too_little_room_is_told_before_anything_is_written(images, monkeypatch, tmp_path):
    inputs, _ = on_disk(images, tmp_path / "there")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=ROOM // 8))
    with pytest.raises(ValueError, match=f"--cache disk: .* and 0.3 GB for checkpoints do not fit .*0.3 GB free in {tmp_path}/not/yet"):
        choose_place("disk", [inputs], CPU, tmp_path / "not/yet")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert choose_place("disk", [inputs], CPU, tmp_path / "there")[0] == "disk"  # it is there already


def test_free_memory_is_within_the_machine_s():
    assert 2**20 < machine.free_memory("host", CPU, HERE) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("version, limit, used, cached", [
    (2, "memory.max", "memory.current", "inactive_file"),
    (1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")])
@pytest.mark.parametrize("limited", ["job/step", "job", "."])  # its own group, or one around it
def test_a_container_s_limit_counts(monkeypatch, tmp_path, version, limit, used, cached, limited):
    (tmp_path / "cgroup").write_text("12:cpu:/job/step\n4:memory:/job/step\n" if version == 1 else "0::/job/step\n")
    root = tmp_path if version == 2 else tmp_path / "memory"
    (root / "job/step").mkdir(parents=True)
    for group in ("job/step", "job", "."):
        for name, text in {limit: "5000000\n" if group == limited else "max\n" if version == 2 else "9223372036854771712\n",
                           used: "4000000\n", "memory.stat": f"anon 9\n{cached} 500000\n"}.items():
            (root / group / name).write_text(text)
    path = machine.Path
    monkeypatch.setattr(machine, "Path", lambda name: path(str(name).replace("/sys/fs/cgroup", str(tmp_path)).replace(
        "/proc/self/cgroup", str(tmp_path / "cgroup"))))
    assert machine.free_memory("host", CPU, HERE) == 1_500_000
