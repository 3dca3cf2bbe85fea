"""Devices, precisions and memory, on machines that this one is not."""

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.torch_version import TorchVersion

from data import UserError
from plumbing import machine

CPU = torch.device("cpu")
HERE = Path("features")
NO_KERNELS = """CUDA error: no kernel image is available for execution on the device
CUDA kernel errors might be asynchronously reported at some other API call."""


def there(
    monkeypatch, cards: int, mps: bool, broken: tuple[str, ...] = (), version: str = "2.14.0+cpu"
) -> None:
    """A machine with so many CUDA cards; on the devices in `broken` nothing can be computed."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    ones = torch.ones

    def computed(*size, device=None):
        if device in broken:
            raise RuntimeError(NO_KERNELS)
        return ones(*size)

    monkeypatch.setattr(torch, "ones", computed)


@pytest.mark.parametrize(
    "cards, mps, broken, version, device, says",
    [
        (1, True, (), "2.14.0", "cuda", ""),
        (0, True, (), "2.15.0", "mps", ""),
        (0, False, (), "2.14.0", "cpu", ""),
        (1, True, ("cuda",), "2.14.0", "mps", "no CUDA: this PyTorch .* on the device\n"),
        (0, True, (), "2.4.0", "cpu", "no MPS: this PyTorch .*pytorch/pytorch#175189.*\n"),
    ],
)
def test_auto_takes_the_best_there_is(
    capsys, monkeypatch, cards, mps, broken, version, device, says
):
    there(monkeypatch, cards, mps, broken, version)
    assert machine.pick_device("auto").type == device
    assert machine.pick_device("cpu") == CPU
    assert re.fullmatch(f"(device   )?{says}", capsys.readouterr().out)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("cuda:2", "sees no such device"),
        ("cuda:1", "no kernel image"),
        ("mps", "2.13.1.*BatchNorm.*pytorch/pytorch#175189.*2.14 or newer"),
    ],
)
def test_a_device_that_was_asked_for_and_does_not_work_is_refused(monkeypatch, name, reason):
    there(monkeypatch, cards=2, mps=True, broken=("cuda:1",), version="2.13.1")
    assert machine.pick_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(UserError, match=f"--device {name}: .*{reason}.*--device auto"):
        machine.pick_device(name)


def test_a_flag_takes_devices_and_nothing_else():
    for name in ("auto", "cpu", "mps", "cuda", "cuda:0", "cuda:15"):
        assert machine.device_flag(name) == name
    for name in ("", "gpu", "cuda:", "cuda:x", "cuda:-1", "mps:0", "cuda:1\n"):
        with pytest.raises(argparse.ArgumentTypeError, match="takes auto, cpu, mps, cuda or"):
            machine.device_flag(name)


def test_tuning_makes_the_card_that_was_asked_for_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    machine.tune(torch.device("cuda", 1))
    machine.tune(torch.device("cuda"))  # torch refuses a device without a number
    assert chosen == [torch.device("cuda", 1)] and torch.backends.cudnn.benchmark


def test_a_system_without_glibc_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    machine.tune(CPU)


@pytest.mark.parametrize("cuda_build, driver", [(False, True), (True, True), (False, False)])
def test_a_card_that_this_torch_was_not_built_for_is_told(monkeypatch, capsys, cuda_build, driver):
    there(monkeypatch, cards=0, mps=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0" if cuda_build else None)
    monkeypatch.setattr(shutil, "which", lambda name: name if driver else None)
    assert machine.pick_device("auto") == CPU
    told = "built without CUDA: https://pytorch.org/get-started/locally" in capsys.readouterr().out
    assert told == (driver and not cuda_build)


def test_the_precision_is_what_the_hardware_multiplies_fast(monkeypatch):
    cuda, mps = torch.device("cuda"), torch.device("mps")
    for capability, precision in [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert machine.pick_precision("auto", cuda) == precision
    for has, precision in [("amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("avx2", "fp32")]:
        found = {"amx_bf16": False, "avx512_bf16": False, has: True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert machine.pick_precision("auto", CPU) == precision
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # before torch 2.11
    for flags, precision in [("avx2 amx_bf16 amx_tile", "bf16"), ("avx2 avx512f", "fp32")]:
        monkeypatch.setattr(Path, "read_text", lambda *_, flags=flags: f"flags : {flags}\n")
        assert machine.pick_precision("auto", CPU) == precision
    assert machine.pick_precision("auto", mps) == "fp32"
    assert machine.pick_precision("bf16", CPU) == "bf16"
    with pytest.raises(UserError, match="--precision fp16 is not for Apple's GPUs"):
        machine.pick_precision("fp16", mps)


@pytest.mark.parametrize("precision", machine.PRECISIONS)
def test_autocast_computes_in_the_precision(precision):
    with machine.autocast(CPU, precision):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == machine.PRECISIONS[precision]


@pytest.mark.parametrize(
    "error, full",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_full_memory_is_known_by_its_many_names(error, full):
    assert machine.memory_is_full(error) == full
    of_a_record = RuntimeError("operation failed due to a previous error during capture")
    of_a_record.__context__ = error
    assert machine.memory_is_full(of_a_record) == full


def test_free_memory_is_within_the_machine_s_and_shared_by_its_processes(monkeypatch):
    free = machine.free_memory("host", CPU, HERE)
    assert 2**20 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.free_memory("host", CPU, HERE) == pytest.approx(free / 4, rel=0.2)


def test_the_room_on_a_disk_is_that_of_the_nearest_folder(tmp_path):
    free = machine.free_memory("disk", CPU, tmp_path / "not/yet")
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("limited", ["/job/step", "/job", ""])  # its own group, or one around it
def test_a_container_s_limit_counts(monkeypatch, tmp_path, limited):
    def write(name: str, text: str) -> None:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    monkeypatch.setattr(machine, "Path", lambda name: Path(f"{tmp_path}{name}"))
    write("proc/meminfo", "MemFree: 5 kB\nMemAvailable: 7000 kB\n")
    assert machine.free_memory("host", CPU, HERE) == 7000 * 1024
    write("proc/self/cgroup", "4:memory:/old\n0::/job/step\n")
    for group in ("/job/step", "/job", ""):
        write(f"sys/fs/cgroup{group}/memory.max", "max\n")
        write(f"sys/fs/cgroup{group}/memory.current", "4000000\n")
        write(f"sys/fs/cgroup{group}/memory.stat", "anon 9\ninactive_file 500000\n")
    assert machine.free_memory("host", CPU, HERE) == 7000 * 1024
    write(f"sys/fs/cgroup{limited}/memory.max", "5000000\n")
    assert machine.free_memory("host", CPU, HERE) == 1_500_000


def test_on_macos_half_of_all_is_guessed(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.get)
    assert machine.free_memory("host", CPU, HERE) == 2_048_000
    assert machine.free_memory("device", torch.device("mps"), HERE) == 2_048_000


def test_windows_tells_what_is_free(monkeypatch):
    def tell(status) -> int:
        assert status[0] == 64 == ctypes.sizeof(status)
        status[1], status[2] = 9_000_000, 5_000_000  # all there is, and what is free
        return 1

    windows = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=tell))
    monkeypatch.setattr(ctypes, "windll", windows, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert machine.free_memory("host", CPU, HERE) == 5_000_000


def test_what_this_machine_is_called_and_the_memory_that_was_in_use():
    assert re.fullmatch(r"\S.* cpu \(\d+ threads\)", machine.device_name(CPU))
    assert 1e8 < machine.peak_host_bytes() < 1e12


NOWHERE = """
import ctypes, os, pathlib, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
import torch, torchvision
del os.sysconf
read_text = pathlib.Path.read_text

def read(path, **more):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(path)
    return read_text(path, **more)

pathlib.Path.read_text, ctypes.CDLL = read, None
import compare, evaluate, study.benchmark, study.textbook, train
from plumbing import machine
cpu = torch.device("cpu")
assert machine.free_memory("host", cpu, pathlib.Path("x")) is None
assert machine.peak_host_bytes() == 0
flags = "--dataset synthetic --weights none --image-size 32 --train-size 20 --batch-size 10"
flags += " --epochs 1 --device cpu --precision fp32 --out"
train.main([*flags.split(), sys.argv[1]])
"""


@pytest.mark.slow
def test_a_run_where_fcntl_resource_sysconf_glibc_and_proc_are_missing(tmp_path):
    """As on Windows, but for its libraries."""
    command = [sys.executable, "-c", NOWHERE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "how much is free is not known" in done.stdout
    assert len(list(tmp_path.glob("*/epoch1.pt"))) == 1
