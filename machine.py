"""The machine: its devices, its memory, and how a script ends on it.

    device = pick_device("auto")
    precision = pick_precision("auto", device)      # "bf16", "fp16" or "fp32"
    with autocast(device, precision): ...
    command(main, "go on with --resume", "lower --batch-size")   # a script's last line
"""

import contextlib
import ctypes
import os
import platform
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from data import progress

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CGROUPS = {  # by their name in /proc/self/cgroup, version 2 and 1: root, and where limit, use and reclaimable part are
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def pick_device(name: str) -> torch.device:
    """auto: CUDA, then Apple's MPS, then the CPU. Raises ValueError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in there if there[device])
    if not there[name]:
        raise ValueError(f"--device {name}: this PyTorch ({torch.__version__}) sees no {name} device; "
                         "--device auto takes what is there")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """auto: bf16 where the hardware multiplies it fast, fp16 on older CUDA cards, else fp32. By compute
    capability: is_bf16_supported() says yes for the T4 that students get for free, which emulates it slowly."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "fp32"


def keep_memory() -> None:
    """Have glibc keep the memory that PyTorch frees. Left alone it returns big blocks to the kernel
    and gets them back page by page, zeroed, for each layer's output in each step. Without that
    the cache fill is 1.24 times as fast on 2 cores (medians of 3, fc + layer4 at 224x224)."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def device_name(device: torch.device) -> str:
    """What a figure was measured on: the GPU's name, or the processor's and its threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return f"{name} {device.type} ({torch.get_num_threads()} threads)"


# ---------------------------------------------------------------- memory


def memory_is_full(error: Exception) -> bool:
    words = ("out of memory", "allocate memory", "alloc_failed")  # of CUDA and MPS, of the CPU, of CUDA's libraries: RuntimeErrors
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def free_memory(place: str, device: torch.device, folder: Path) -> int:
    """Bytes that can be allocated without swapping on the "device" (CUDA's; Apple's GPUs share the
    host's), the "host", or the "disk" that `folder` is on or will be."""
    if place == "disk":
        return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    if place == "device" and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not Path("/proc/meminfo").exists():  # macOS: what is free is not told, half of all is a guess
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    for line in Path("/proc/self/cgroup").read_text().splitlines():  # a container's limit, a batch system's, ...
        _, kind, path = line.split(":", 2)
        root, limit_file, used_file, cached = CGROUPS.get(kind, ("",) * 4)
        group = Path(root + path)
        for group in (group, *group.parents) if root else ():  # ... and of all the groups around it
            if (group / limit_file).exists() and (limit := (group / limit_file).read_text().strip()) != "max":
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / used_file).read_text()) - int(statistics[cached])  # a file's copy can be dropped
                free = min(free, int(limit) - used)
    return free


# ---------------------------------------------------------------- a script's end


def command(main: Callable[[], None], when_stopped: str, when_full: str) -> None:
    """Run a script so that it ends with one line in place of a traceback: Ctrl-C with status 130,
    SIGTERM with 143; a disk or a memory that is full, or a loss that is not finite, with 1."""

    def terminate(*_) -> None:
        raise KeyboardInterrupt(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)
    try:
        return main()
    except KeyboardInterrupt as stop:
        status, line = stop.args[0] if stop.args else 130, f"stopped; {when_stopped}"
    except (FloatingPointError, OSError, RuntimeError, MemoryError) as error:
        if memory_is_full(error):
            error = f"the memory is full: {when_full}"
        elif not isinstance(error, (FloatingPointError, OSError)):
            raise
        status, line = 1, f"error: {error}"
    progress()
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(status)
