"""Where the prefix's outputs are kept, and that looking one up is computing it."""

import os
from types import SimpleNamespace

import pytest
import torch

import data
import features
import freeze
from features import ROOM, Features, choose_place

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
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
    inputs.fill("host")
    assert inputs.store.nbytes == estimate and inputs.store.dtype == dtype  # known before it is allocated
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for found, expected in zip((inputs(indices, flips), inputs(indices)), computed):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(inputs(indices[:1], flips[:1]), inputs(indices[:1], ~flips[:1]))


def test_a_filled_cache_does_not_run_the_prefix_again(images):
    prefix, _ = freeze.split(freeze.build(10), ["layer4", "fc"])
    inputs = Features(prefix, images, 48, CPU, torch.float32, mirrored=False)
    inputs.fill("device")
    inputs.prefix = None
    assert inputs(torch.tensor([0, 1])).shape == (2, 256, 3, 3)


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
    monkeypatch.setattr(features, "free_memory", lambda where, _: {"device": device, "host": host}[where])
    chosen, why = choose_place(wanted, [need(8 * GB), need(2 * GB)], CUDA)
    assert chosen == place and "10.00 GB of features" in why and place in why


@pytest.mark.parametrize("wanted", ["device", "host"])
def test_a_place_that_was_asked_for_and_is_too_small(monkeypatch, wanted):
    monkeypatch.setattr(features, "free_memory", lambda *_: 3 * GB)
    with pytest.raises(ValueError, match=f"--cache {wanted}: 10.00 GB of features .*3.0 GB free in {wanted} memory.*--train-size"):
        choose_place(wanted, [need(10 * GB)], CUDA)


@pytest.mark.parametrize("device", [CPU, torch.device("mps")])
def test_what_has_no_memory_of_its_own_uses_the_host_s(monkeypatch, device):
    monkeypatch.setattr(features, "free_memory", lambda *_: 80 * GB)
    assert choose_place("auto", [need(10 * GB)], device)[0] == "host"


def test_without_a_prefix_there_is_nothing_to_keep(monkeypatch):
    monkeypatch.setattr(features, "free_memory", lambda *_: 80 * GB)
    assert choose_place("auto", [need(GB, stages=0)], CPU)[0] == "off"


def test_free_memory_is_within_the_machine_s():
    assert 2**20 < features.free_memory("host", CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_container_s_limit_counts(monkeypatch, tmp_path):
    for name, text in {"memory.max": "5000000\n", "memory.current": "4000000\n", "memory.stat": "anon 9\ninactive_file 500000\n"}.items():
        (tmp_path / name).write_text(text)
    path = features.Path
    monkeypatch.setattr(features, "Path", lambda name: tmp_path if name == "/sys/fs/cgroup" else path(name))
    assert features.free_memory("host", CPU) == 1_500_000
