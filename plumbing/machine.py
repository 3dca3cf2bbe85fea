"""The machine: its devices, its precisions, its memory.

    device = pick_device("auto")
    precision = pick_precision("auto", device)      # "bf16", "fp16" or "fp32"
    with autocast(device, precision): ...

What a system does not tell, such as its free memory, is left out.
"""

import argparse
import contextlib
import ctypes
import os
import platform
import re
import shutil
import sys
from pathlib import Path

import torch

from data import UserError
from plumbing.files import nearest

MPS_SINCE = "2.14"  # the first torch with pytorch/pytorch#188371
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NO_DEVICE = "this PyTorch sees no such device"
# In the errors of a full memory, of CUDA and MPS; the CPU, on Linux and Windows; cuBLAS; cuDNN 9.
MEMORY_IS_FULL = "out of memory|allocate memory|not enough memory"
MEMORY_IS_FULL += "|alloc_failed|allocation_failed|unable to find an engine"


def device_flag(text: str) -> str:
    """An argparse type: auto, cpu, mps, cuda or one of several, cuda:1."""
    if not re.fullmatch("auto|cpu|mps|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"takes auto, cpu, mps, cuda or cuda:1, not {text!r}")
    return text


def pick_device(name: str) -> torch.device:
    """auto: the first that works of CUDA, Apple's MPS and the CPU. Raises UserError."""
    if name != "auto":
        if reason := why_not(name):
            raise UserError(f"--device {name}: {reason}; --device auto takes what works")
        return torch.device(name)
    for kind in ("cuda", "mps"):
        reason = why_not(kind)
        if not reason:
            return torch.device(kind)
        if reason != NO_DEVICE:
            print(f"device   no {kind.upper()}: {reason}", flush=True)
    return torch.device("cpu")


def why_not(name: str) -> str | None:
    """Why this PyTorch cannot compute on a device, or None if it can."""
    this = f"this PyTorch ({torch.__version__})"
    kind, _, number = name.partition(":")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        built_with_cuda = torch.version.cuda or torch.version.hip
        if built_with_cuda or not shutil.which("nvidia-smi"):
            return NO_DEVICE
        where = "https://pytorch.org/get-started/locally has the command for the CUDA build"
        return f"there is an NVIDIA card, and {this} was built without CUDA: {where}"
    if kind == "mps" and not torch.backends.mps.is_available():
        return NO_DEVICE
    if kind == "mps" and torch.__version__ < MPS_SINCE:
        wrong = "computes BatchNorm's gradient wrongly on Apple's GPUs (pytorch/pytorch#175189)"
        return f"{this} {wrong}, {MPS_SINCE} or newer does not"
    try:
        torch.ones(1, device=name).add_(1).item()
    except RuntimeError as error:  # a card too old or too new for this build, or an old driver
        return f"{this} cannot use it: {str(error).splitlines()[0]}"
    return None


def pick_precision(name: str, device: torch.device) -> str:
    """auto: bf16 where the hardware multiplies it fast, fp16 on older CUDA cards, else fp32. By
    compute capability, since is_bf16_supported() says yes for a T4, which emulates it slowly."""
    if name == "fp16" and device.type == "mps":
        reason = "fused Adam takes steps that overflowed there (pytorch/pytorch#186360)"
        raise UserError(f"--precision fp16 is not for Apple's GPUs: {reason}; take fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    known = processor()
    if device.type == "cpu" and (known.get("amx_bf16") or known.get("avx512_bf16")):
        return "bf16"
    return "fp32"


def processor() -> dict:
    """The processor's "cpu_name", from torch 2.11 on, and whether it has "amx_bf16", ..."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    with contextlib.suppress(OSError):
        listed = Path("/proc/cpuinfo").read_text()
        return dict.fromkeys(re.findall(r"\b(?:amx|avx512)_bf16\b", listed), True)
    return {}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def tune(device: torch.device) -> None:
    """Settings of libraries that change the speed and not the results; and which GPU is meant."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        if device.index is not None:  # cuda:1; plain cuda is the current one already
            torch.cuda.set_device(device)
    # glibc returns big blocks that PyTorch frees to the kernel, and gets them back page by page,
    # zeroed, for each layer's output in each step. When it keeps them the cache fill is 1.24 times
    # as fast on 2 cores (medians of 3, fc+layer4 at 224x224).
    call_glibc("mallopt", -4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
    call_glibc("mallopt", -1, -1)  # M_TRIM_THRESHOLD: never give back


def call_glibc(function: str, *arguments: int) -> None:
    """Calls a function of glibc's; does nothing where there is another C library."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        getattr(ctypes.CDLL(None), function)(*arguments)


def device_name(device: torch.device) -> str:
    """What a figure was measured on: the GPU's name, or the processor's and its threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = processor().get("cpu_name") or platform.processor() or platform.machine()
    return f"{name} {device.type} ({torch.get_num_threads()} threads)"


def memory_is_full(error: BaseException | None) -> bool:
    """Whether an error says so, by its type or its text. One that is raised while a CUDA graph is
    recorded is the context of another, of the recording."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return bool(re.search(MEMORY_IS_FULL, str(error).lower())) or memory_is_full(error.__context__)


def free_memory(place: str, device: torch.device, folder: Path) -> int | None:
    """Bytes to be had without swapping on the "device" (Apple's GPUs share the host's), the "host",
    or the "disk" that `folder` is on or will be; None where the system does not tell."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun's, on this machine
    if place == "disk":
        return shutil.disk_usage(nearest(folder)).free // processes
    if place == "device" and device.type == "cuda":
        torch.cuda.empty_cache()  # what an earlier run in this process has left
        free, total = torch.cuda.mem_get_info(device)
        runs = int(os.environ.get("RUNS_ON_GPU", 1))  # by run_all.sh: each plans with its share
        return min(free, total // runs)
    call_glibc("malloc_trim", 0)  # what an earlier run has left
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return free_host_memory() // processes
    return None


def free_host_memory() -> int:
    """Raises OSError, ValueError or AttributeError where the system does not tell."""
    if sys.platform == "win32":
        # GlobalMemoryStatusEx fills 64 bytes: their number first, and third what is free.
        status = (ctypes.c_uint64 * 8)(64)
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return status[2]
    if sys.platform == "darwin":  # macOS does not say what is free: half of all is a guess
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    free = [number_in(Path("/proc/meminfo"), "MemAvailable") * 1024]
    # What a container or a batch system leaves this process: its control group (version 2) and
    # every group around it. Copies of files in memory are free, because the kernel drops them.
    with contextlib.suppress(OSError, ValueError):
        (path,) = re.findall("^0::(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        group = Path("/sys/fs/cgroup" + path)
        for folder in (group, *group.parents):
            limit = folder / "memory.max"
            if limit.exists() and limit.read_text().strip() != "max":
                used = int((folder / "memory.current").read_text())
                copies = number_in(folder / "memory.stat", "inactive_file")
                free.append(int(limit.read_text()) - used + copies)
    return min(free)


def number_in(file: Path, name: str) -> int:
    """The number after a name in a file of Linux's. Raises OSError or ValueError."""
    (number,) = re.findall(rf"^{name}:?\s+(\d+)", file.read_text(), re.MULTILINE)
    return int(number)


def peak_host_bytes() -> int:
    """Peak memory of this process, without its workers; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError):  # Linux; getrusage would add the parent's
        return number_in(Path("/proc/self/status"), "VmHWM") * 1024
    return 0
