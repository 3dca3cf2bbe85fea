"""Devices, precisions and memory, on machines that this one is not."""

import argparse
import ctypes
import os
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

# ---------------------------------------------------------------- devices and precisions


def there(monkeypatch, cuda: int, mps: bool, broken: tuple[str, ...] = ()) -> None:
    """A machine with so many CUDA cards; on the devices in `broken` nothing can be computed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    ones = torch.ones

    def computed(*size, device=None):
        if device in broken:
            raise RuntimeError(NO_KERNELS)
        return ones(*size)

    monkeypatch.setattr(torch, "ones", computed)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.14.0+cpu"))


NO_KERNELS = """CUDA error: no kernel image is available for execution on the device
Search for `cudaErrorNoKernelImageForDevice' in the documentation of CUDA.
CUDA kernel errors might be asynchronously reported at some other API call."""


@pytest.mark.parametrize(
    "cuda, mps, device",
    [
        (True, True, "cuda"),
        (True, False, "cuda"),
        (False, True, "mps"),
        (False, False, "cpu"),
    ],
)
def test_the_best_device_that_is_there(monkeypatch, cuda, mps, device):
    there(monkeypatch, cuda, mps)
    assert machine.pick_device("auto").type == device
    assert machine.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "mps"], ids=["no cuda", "no mps"])
def test_a_device_that_is_not_there(monkeypatch, name):
    there(monkeypatch, cuda=False, mps=False)
    with pytest.raises(UserError, match=f"--device {name}: .* sees no such device"):
        machine.pick_device(name)


def test_one_of_several_cards(monkeypatch):
    there(monkeypatch, cuda=2, mps=False)
    assert machine.pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="--device cuda:2: .* sees no such device"):
        machine.pick_device("cuda:2")


def test_a_flag_takes_devices_and_nothing_else():
    for name in ("auto", "cpu", "mps", "cuda", "cuda:0", "cuda:1", "cuda:15"):
        assert machine.device_flag(name) == name
    for name in ("", "gpu", "cuda:", "cuda:x", "cuda1", "cuda:-1", "mps:0", "cuda:1 ", "cuda:1\n"):
        with pytest.raises(argparse.ArgumentTypeError, match="takes auto, cpu, mps, cuda or"):
            machine.device_flag(name)


@pytest.mark.parametrize("mps, device", [(False, "cpu"), (True, "mps")])
def test_a_card_without_kernels_is_passed_over_and_that_is_said(monkeypatch, capsys, mps, device):
    there(monkeypatch, cuda=1, mps=mps, broken=("cuda",))
    assert machine.pick_device("auto").type == device
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("device   no CUDA: ") and line.endswith(NO_KERNELS.splitlines()[0])


def test_a_card_without_kernels_that_was_asked_for_is_one_line(monkeypatch):
    there(monkeypatch, cuda=2, mps=False, broken=("cuda:1",))
    assert machine.pick_device("cuda:0").index == 0
    with pytest.raises(UserError, match="--device cuda:1: .*no kernel image") as failure:
        machine.pick_device("cuda:1")
    assert "\n" not in str(failure.value) and "--device auto" in str(failure.value)


def test_tuning_makes_the_card_that_was_asked_for_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    machine.tune(torch.device("cuda", 1))
    assert chosen == [torch.device("cuda", 1)] and torch.backends.cudnn.benchmark
    machine.tune(torch.device("cuda"))  # torch refuses a device without a number
    assert chosen == [torch.device("cuda", 1)]


@pytest.mark.parametrize(
    "capability, precision",
    [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")],
)
def test_the_precision_of_a_cuda_card_goes_by_what_it_multiplies_fast(
    monkeypatch, capability, precision
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert machine.pick_precision("auto", torch.device("cuda")) == precision


@pytest.mark.parametrize(
    "capabilities, precision",
    [
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "avx2": True}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_the_precision_of_a_processor_goes_by_its_instructions(
    monkeypatch, capabilities, precision
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert machine.pick_precision("auto", CPU) == precision


@pytest.mark.parametrize("flags, precision", [("fpu avx512_bf16", "bf16"), ("fpu avx2", "fp32")])
def test_before_torch_2_11_linux_tells_what_a_processor_can_do(
    monkeypatch, elsewhere, flags, precision
):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    elsewhere("/proc/cpuinfo", f"processor\t: 0\nmodel name\t: A Chip\nflags\t\t: {flags}\n\n")
    assert machine.pick_precision("auto", CPU) == precision
    assert machine.device_name(CPU).startswith("A Chip cpu (")


def test_without_proc_a_processor_is_taken_for_a_plain_one(monkeypatch, elsewhere):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert machine.pick_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize(
    "version, device", [("2.13.1", "cpu"), ("2.4.0", "cpu"), ("2.15.0", "mps")]
)
def test_apple_s_gpus_are_used_from_the_torch_on_that_computes_rightly(
    monkeypatch, capsys, version, device
):
    there(monkeypatch, cuda=0, mps=True)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert machine.pick_device("auto").type == device
    if device == "cpu":
        assert "pytorch/pytorch#175189" in capsys.readouterr().out
        with pytest.raises(UserError, match=f"--device mps: .*{version}.*BatchNorm.*2.14 or newer"):
            machine.pick_device("mps")


def test_fp16_is_not_for_apple_s_gpus():
    with pytest.raises(UserError, match="--precision fp16 is not for Apple's GPUs"):
        machine.pick_precision("fp16", torch.device("mps"))


@pytest.mark.parametrize("cuda_build, driver", [(False, True), (True, True), (False, False)])
def test_a_card_that_this_torch_was_not_built_for_is_told(monkeypatch, capsys, cuda_build, driver):
    """What pip installs on Windows."""
    there(monkeypatch, cuda=0, mps=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0" if cuda_build else None)
    monkeypatch.setattr(shutil, "which", lambda name: name if driver else None)
    assert machine.pick_device("auto") == CPU
    told = "built without CUDA: https://pytorch.org/get-started/locally" in capsys.readouterr().out
    assert told == (driver and not cuda_build)
    with pytest.raises(UserError, match="built without CUDA" if told else "sees no such device"):
        machine.pick_device("cuda")


def test_a_precision_that_was_asked_for_stays():
    for name in machine.PRECISIONS:
        assert machine.pick_precision(name, CPU) == name
    assert machine.pick_precision("auto", torch.device("mps")) == "fp32"


@pytest.mark.parametrize("precision", machine.PRECISIONS)
def test_autocast_computes_in_the_precision(precision):
    with machine.autocast(CPU, precision):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == machine.PRECISIONS[precision]


def test_a_figure_s_device_has_a_name_and_its_threads():
    name = machine.device_name(CPU)
    assert f"cpu ({torch.get_num_threads()} threads)" in name and not name.startswith(" ")


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "error, full",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (ValueError("out of memory"), False),
        (OSError("Cannot allocate memory"), False),
    ],
)
def test_a_full_memory_is_known_by_its_many_names(error, full):
    assert machine.memory_is_full(error) == full


def test_what_the_allocator_raises_is_known():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert machine.memory_is_full(raised.value)


def test_a_full_memory_while_a_graph_is_recorded_is_known():
    with pytest.raises(RuntimeError) as raised:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    assert machine.memory_is_full(raised.value)


def test_the_processes_of_one_run_share_the_host_s_memory(monkeypatch):
    monkeypatch.setattr(machine, "available", lambda: 100)
    assert machine.free_memory("host", CPU, HERE) == 100
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.free_memory("host", CPU, HERE) == 25


def test_free_memory_is_within_the_machine_s():
    all_there_is = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < machine.free_memory("host", CPU, HERE) <= all_there_is
    assert 0 < machine.free_memory("disk", CPU, HERE) <= shutil.disk_usage(".").total


def test_the_room_on_a_disk_is_that_of_the_nearest_folder(tmp_path):
    free = machine.free_memory("disk", CPU, tmp_path / "not/yet")
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert not (tmp_path / "not").exists()


def test_peak_memory_is_this_process_s():
    assert 1e8 < machine.peak_host_bytes() < 1e12


# ---------------------------------------------------------------- other machines


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """/proc and /sys are folders under tmp_path. elsewhere("/proc/meminfo", text) writes there."""

    def write(name: str, text: str) -> None:
        file = tmp_path / name.removeprefix("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    monkeypatch.setattr(machine, "Path", lambda name: Path(f"{tmp_path}{name}"))
    return write


MEMINFO = "MemTotal: 9000000 kB\nMemFree: 5 kB\nMemAvailable: 7000 kB\n"
VERSIONS = {
    1: {
        "cgroup": "12:cpu:/job/step\n4:memory:/job/step\n",
        "root": "/sys/fs/cgroup/memory",
        "limit": "memory.limit_in_bytes",
        "used": "memory.usage_in_bytes",
        "cached": "total_inactive_file",
        "unlimited": "9223372036854771712\n",
    },
    2: {
        "cgroup": "0::/job/step\n",
        "root": "/sys/fs/cgroup",
        "limit": "memory.max",
        "used": "memory.current",
        "cached": "inactive_file",
        "unlimited": "max\n",
    },
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("limited", ["/job/step", "/job", ""])  # its own group, or one around it
def test_a_container_s_limit_counts(elsewhere, version, limited):
    names = VERSIONS[version]
    elsewhere("/proc/meminfo", MEMINFO)
    elsewhere("/proc/self/cgroup", names["cgroup"])
    for group in ("/job/step", "/job", ""):
        folder = names["root"] + group
        elsewhere(f"{folder}/{names['limit']}", names["unlimited"])
        elsewhere(f"{folder}/{names['used']}", "4000000\n")
        elsewhere(f"{folder}/memory.stat", f"anon 9\n{names['cached']} 500000\n")
    assert machine.free_memory("host", CPU, HERE) == 7000 * 1024
    elsewhere(f"{names['root']}{limited}/{names['limit']}", "5000000\n")
    assert machine.free_memory("host", CPU, HERE) == 1_500_000


def test_without_groups_linux_s_own_estimate_is_taken(elsewhere):
    elsewhere("/proc/meminfo", MEMINFO)
    assert machine.free_memory("host", CPU, HERE) == 7000 * 1024


def test_a_group_of_which_nothing_is_known_is_left_out(elsewhere):
    elsewhere("/proc/meminfo", MEMINFO)
    elsewhere("/proc/self/cgroup", "0::/job\nnonsense\n")
    assert machine.free_memory("host", CPU, HERE) == 7000 * 1024


def test_an_old_kernel_makes_no_estimate_but_a_group_does(elsewhere):
    elsewhere("/proc/meminfo", "MemTotal: 9000000 kB\nMemFree: 5 kB\n")
    assert machine.free_memory("host", CPU, HERE) is None
    elsewhere("/proc/self/cgroup", "0::/job\n")
    elsewhere("/sys/fs/cgroup/job/memory.max", "5000000\n")
    elsewhere("/sys/fs/cgroup/job/memory.current", "4000000\n")
    elsewhere("/sys/fs/cgroup/job/memory.stat", "inactive_file 500000\n")
    assert machine.free_memory("host", CPU, HERE) == 1_500_000


def test_without_proc_half_of_all_is_guessed(elsewhere, monkeypatch):
    pages = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.get)
    assert machine.free_memory("host", CPU, HERE) == 2_048_000
    assert machine.free_memory("device", torch.device("mps"), HERE) == 2_048_000


def test_windows_tells_what_is_free(elsewhere, monkeypatch):
    def fill(status) -> int:
        assert status[0] == 64 == ctypes.sizeof(status)
        status[1], status[2] = 9_000_000, 5_000_000  # all there is, and what is free
        return 1

    kernel32 = SimpleNamespace(GlobalMemoryStatusEx=fill)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    monkeypatch.delattr(os, "sysconf")
    assert machine.free_memory("host", CPU, HERE) == 5_000_000


def test_without_sysconf_nothing_is_guessed(elsewhere, monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert machine.free_memory("host", CPU, HERE) is None


def test_without_proc_the_peak_is_getrusage_s_and_without_that_0(elsewhere, monkeypatch):
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=77))
    monkeypatch.setitem(sys.modules, "resource", usage)
    assert machine.peak_host_bytes() == 77
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_host_bytes() == 0


def no_library(name):
    raise OSError("no libc")


def no_name(name):
    raise TypeError("a name is needed")


@pytest.mark.parametrize("library", [no_library, no_name, lambda name: SimpleNamespace()])
def test_a_libc_without_mallopt_is_left_alone(monkeypatch, library):
    monkeypatch.setattr(machine.ctypes, "CDLL", library)
    machine.tune(CPU)


NOWHERE = """
import ctypes, os, pathlib, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
import torch, torchvision
del os.sysconf
read_text, exists = pathlib.Path.read_text, pathlib.Path.exists

def is_there(path, **more):
    return not str(path).startswith(("/proc", "/sys")) and exists(path, **more)

def read(path, **more):
    if not is_there(path):
        raise FileNotFoundError(path)
    return read_text(path, **more)

def library(name, *more, **others):
    raise TypeError("a name is needed")

pathlib.Path.exists, pathlib.Path.read_text, ctypes.CDLL = is_there, read, library
"""
RUN = """
import compare, evaluate, study.benchmark, study.textbook, train
from plumbing import machine
cpu = torch.device("cpu")
assert machine.free_memory("host", cpu, pathlib.Path("x")) is None
assert machine.peak_host_bytes() == 0
flags = "--dataset synthetic --weights none --image-size 32 --train-size 20 --batch-size 10"
flags += " --epochs 1 --device cpu --precision fp32 --out"
train.main([*flags.split(), sys.argv[1]])
"""
ROOMS = """
import importlib
sys.path.insert(0, "")
for room, needs in {"data": [], "freeze": [], "features": ["data"]}.items():
    os.chdir(os.path.join(sys.argv[1], room))
    for name in (room, *needs):
        sys.modules.pop(name, None)
    module = importlib.import_module(room)
    assert os.path.dirname(os.path.abspath(module.__file__)) == os.getcwd(), module.__file__
    for name in ("data", "freeze", "features", "plumbing"):
        assert name in (room, *needs) or name not in sys.modules, name
    for name in (room, *needs):
        print(name, "from", sys.modules.pop(name).__name__)
"""


def python(script: str, folder: Path, argument: Path) -> str:
    """What a script prints that runs in a Python of its own, in `folder`."""
    command = [sys.executable, "-c", script, str(argument)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_where_fcntl_resource_sysconf_mallopt_and_proc_are_missing(tmp_path):
    """As on Windows, but for its libraries."""
    out = python(NOWHERE + RUN, ROOT, tmp_path)
    assert "how much is free is not known" in out
    assert len(list(tmp_path.glob("*/epoch1.pt"))) == 1


def test_each_room_imports_alone_in_an_empty_folder(tmp_path):
    needed = {"data": ["data"], "freeze": ["freeze"], "features": ["features", "data"]}
    for room, files in needed.items():
        (tmp_path / room).mkdir()
        for file in files:
            shutil.copy(ROOT / f"{file}.py", tmp_path / room)
    python(NOWHERE + ROOMS, tmp_path, tmp_path)
