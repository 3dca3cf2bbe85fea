"""The machine: its devices, its precisions, its memory.

    device = pick_device("auto")
    precision = pick_precision("auto", device)      # "bf16", "fp16" or "fp32"
    with autocast(device, precision): ...

Every system lacks some of what is asked for here. An estimate that cannot be made is left out.
"""

import argparse
import contextlib
import ctypes
import os
import platform
import re
import shutil
from pathlib import Path

import torch

from data import UserError
from plumbing.files import nearest

MPS_SINCE = "2.14"  # the first torch with pytorch/pytorch#188371
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# By their name in /proc/self/cgroup, version 2 and 1: the root, and the files of limit and use.
CGROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}
RECLAIMABLE = ("inactive_file", "total_inactive_file")  # version 2, 1: a file's copy can be dropped


def device_flag(text: str) -> str:
    """An argparse type: auto, cpu, mps, cuda or one of several, cuda:1."""
    if not re.fullmatch("auto|cpu|mps|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"takes auto, cpu, mps, cuda or cuda:1, not {text!r}")
    return text


def pick_device(name: str) -> torch.device:
    """auto: CUDA, then Apple's MPS, then the CPU, the first that works. Raises UserError for one
    that does not."""
    if name != "auto":
        if reason := why_not(name):
            raise UserError(f"--device {name}: {reason}; --device auto takes what works")
        return torch.device(name)
    for kind, backend in {"cuda": torch.cuda, "mps": torch.backends.mps}.items():
        if backend.is_available():
            reason = why_not(kind)
            if not reason:
                return torch.device(kind)
            print(f"device   no {kind.upper()}: {reason}", flush=True)
    if cpu_build():
        print(f"device   no CUDA: {cpu_build()}", flush=True)
    return torch.device("cpu")


def why_not(name: str) -> str | None:
    """Why this PyTorch cannot compute on a device, or None if it can."""
    torch_here = f"this PyTorch ({torch.__version__})"
    if name == "mps" and torch.__version__ < MPS_SINCE:
        wrong = "computes BatchNorm's gradient wrongly on Apple's GPUs (pytorch/pytorch#175189)"
        return f"{torch_here} {wrong}, {MPS_SINCE} or newer does not"
    there = torch.backends.mps.is_available() if name == "mps" else True
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        there = int(name.partition(":")[2] or 0) < count
        if not there and cpu_build():
            return cpu_build()
    if not there:
        return f"{torch_here} sees no such device"
    try:
        torch.ones(1, device=name).add_(1).item()
    except RuntimeError as error:  # a card too old or too new for this build
        return f"{torch_here} cannot use it: {str(error).splitlines()[0]}"
    return None


def cpu_build() -> str | None:
    """What to do where a driver says that there is an NVIDIA card, and torch was built without
    CUDA, as what pip installs on Windows is."""
    if torch.version.cuda or torch.version.hip or not shutil.which("nvidia-smi"):
        return None
    return (
        f"there is an NVIDIA card, and this PyTorch ({torch.__version__}) was built without CUDA: "
        "https://pytorch.org/get-started/locally has the command that installs the CUDA build"
    )


def pick_precision(name: str, device: torch.device) -> str:
    """auto: bf16 where the hardware multiplies it fast, fp16 on older CUDA cards, else fp32. By
    compute capability: is_bf16_supported() says yes for the T4 that students get for free, which
    emulates it slowly. Raises UserError."""
    if name == "fp16" and device.type == "mps":
        reason = "fused Adam takes steps that overflowed there (pytorch/pytorch#186360)"
        raise UserError(f"--precision fp16 is not for Apple's GPUs: {reason}; take fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if device.type == "cpu" and processor().keys() & {"amx_bf16", "avx512_bf16"}:
        return "bf16"
    return "fp32"


def processor() -> dict[str, str]:
    """The processor's name, as cpu_name, and what it can do, by the names that Linux has for it.
    Empty where there is no telling."""
    if hasattr(torch.cpu, "get_capabilities"):  # from torch 2.11 on
        return {name: str(value) for name, value in torch.cpu.get_capabilities().items() if value}
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = (part.strip() for part in line.partition(":"))
            if name == "model name":
                found["cpu_name"] = value
            if name == "flags":
                found |= dict.fromkeys(value.split(), "True")
    return found


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def tune(device: torch.device) -> None:
    """Settings of libraries that change the speed and not the results; and which GPU is meant.

    glibc: keep the memory that PyTorch frees. Left alone it returns big blocks to the kernel and
    gets them back page by page, zeroed, for each layer's output in each step. Without that the
    cache fill is 1.24 times as fast on 2 cores (medians of 3, fc+layer4 at 224x224).
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        if device.index is not None:  # cuda:1; plain cuda is the current one already
            torch.cuda.set_device(device)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system, another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


def device_name(device: torch.device) -> str:
    """What a figure was measured on: the GPU's name, or the processor's and its threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = processor().get("cpu_name") or platform.processor() or platform.machine()
    return f"{name} {device.type} ({torch.get_num_threads()} threads)"


# ---------------------------------------------------------------- memory


def memory_is_full(error: Exception) -> bool:
    """Whether an error is a library's way of saying so; many raise a plain RuntimeError, and one
    that is recorded into a CUDA graph ends in another, of the recording."""
    if isinstance(error.__context__, RuntimeError) and memory_is_full(error.__context__):
        return True
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # in turn: CUDA and MPS; the CPU, on Linux and on Windows; cuBLAS; cuDNN 9, in two ways
    words = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")
    words += ("allocation_failed", "unable to find an engine")
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def free_memory(place: str, device: torch.device, folder: Path) -> int | None:
    """Bytes that can be allocated without swapping on the "device" (CUDA's; Apple's GPUs share
    the host's), the "host", or the "disk" that `folder` is on or will be; None where the system
    does not tell."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine, by torchrun
    if place == "disk":
        return shutil.disk_usage(nearest(folder)).free // sharing
    if place == "device" and device.type == "cuda":
        torch.cuda.empty_cache()  # what an earlier run in this process has left
        free, total = torch.cuda.mem_get_info(device)
        runs = int(os.environ.get("RUNS_ON_GPU", 1))  # by run_all.sh: each plans with its share
        return min(free, total // runs)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # as in `tune`
        ctypes.CDLL(None).malloc_trim(0)
    estimates = []
    for ask in (available, windows_available, half_of_all, group_limit):
        with contextlib.suppress(OSError, ValueError, LookupError, AttributeError, StopIteration):
            estimates.append(ask())
    known = [estimate for estimate in estimates if estimate is not None]
    if not known:
        return None
    return min(known) // sharing


def available() -> int | None:
    """Linux's own estimate, where the kernel makes one."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    meminfo = dict(line.split(":", 1) for line in lines)
    return int(meminfo["MemAvailable"].split()[0]) * 1024


def windows_available() -> int:
    """GlobalMemoryStatusEx fills 64 bytes: their number first, and third what is free of the
    memory that is really there."""
    status = (ctypes.c_uint64 * 8)(64)
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(status):
        raise OSError("GlobalMemoryStatusEx failed")
    return status[2]


def half_of_all() -> int | None:
    """macOS does not say what is free: half of all is a guess. Elsewhere nothing is guessed."""
    if Path("/proc/meminfo").exists():
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def group_limit() -> int | None:
    """What a container or a batch system leaves this process, and every group around it."""
    free = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kind, path = line.split(":", 2)
        if kind not in CGROUPS:
            continue
        root, limit_file, used_file = CGROUPS[kind]
        group = Path(root + path)
        for folder in (group, *group.parents):
            if (folder / limit_file).exists():
                limit = (folder / limit_file).read_text().strip()
                if limit != "max":
                    free.append(int(limit) - used(folder, used_file))
    return min(free, default=None)


def used(group: Path, used_file: str) -> int:
    """Bytes in use by a control group, without those that can be dropped."""
    lines = (group / "memory.stat").read_text().splitlines()
    statistics = dict(line.split() for line in lines)
    dropped = next(int(statistics[name]) for name in RECLAIMABLE[::-1] if name in statistics)
    return int((group / used_file).read_text()) - dropped


def peak_host_bytes() -> int:
    """Peak memory of this process, without its workers; 0 where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration):  # Linux; getrusage would add the parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    with contextlib.suppress(ImportError):
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 0
