"""What the trainable tail sees: the frozen prefix's output for (image, flip), looked up or computed.

The prefix is frozen and in eval mode and the only augmentation is a mirror image, so an image
has exactly two inputs to the tail. Computed once each, they turn every later epoch's pass
through the prefix into a lookup.

    train = Features(prefix, images.pixels, 224, device, dtype, mirrored=True)
    place, why = choose_place("auto", [train], device)
    train.fill(place)
    x = train(indices, flips)        # the same values, filled or not
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from data import progress, transform

PLACES = ("auto", "device", "host", "off")
CHUNK = 128  # images per pass through the prefix in the fill
ROOM = 2 * 2**30  # bytes left free for training beside the cache


class Features:
    """The inputs of the tail for one split: `dtype` [B, C, H, W] in channels_last memory.

    prefix: the frozen stages, any module; pixels: uint8 [N, H, W, 3]; mirrored: whether both
    flips will be asked for (training) or only the image itself (test).
    """

    def __init__(self, prefix: nn.Module, pixels: torch.Tensor, image_size: int, device: torch.device,
                 dtype: torch.dtype, mirrored: bool):
        self.prefix = prefix.to(device, dtype, memory_format=torch.channels_last)
        self.pixels, self.image_size, self.device, self.dtype = pixels, image_size, device, dtype
        self.store = None
        one = self.compute(torch.tensor([0])).permute(0, 2, 3, 1)
        self.shape = (2 * len(pixels) if mirrored else len(pixels), *one.shape[1:])
        self.bytes = one.nbytes * self.shape[0]

    def __len__(self) -> int:
        return len(self.pixels)

    def __call__(self, indices: torch.Tensor, flips: torch.Tensor | None = None) -> torch.Tensor:
        """Features of the images at `indices`, int64 [B], mirrored where `flips`, bool [B]."""
        if self.store is None:
            return self.compute(indices, flips)
        rows = indices if flips is None else indices + len(self) * flips
        return self.store.index_select(0, rows.to(self.store.device)).to(self.device).permute(0, 3, 1, 2)

    @torch.no_grad()
    def compute(self, indices: torch.Tensor, flips: torch.Tensor | None = None) -> torch.Tensor:
        """The same without looking anything up."""
        pixels = self.pixels[indices].to(self.device)
        flips = None if flips is None else flips.to(self.device)
        return self.prefix(transform(pixels, self.image_size, self.dtype, flips))

    def fill(self, place: str) -> None:
        """Compute every feature once and keep it on "device" or "host"; "off" keeps nothing."""
        if place == "off":
            return
        store = torch.empty(self.shape, dtype=self.dtype, device=self.device if place == "device" else "cpu")
        start = time.monotonic()
        for first in range(0, len(store), CHUNK):
            rows = torch.arange(first, min(first + CHUNK, len(store)))
            features = self.compute(rows % len(self), rows >= len(self))
            store[first:first + CHUNK] = features.permute(0, 2, 3, 1)
            done = first + len(rows)
            rate = done / (time.monotonic() - start)
            progress(f"filling the cache: {done:,} of {len(store):,} images, {rate:,.0f} a second, "
                     f"{(len(store) - done) / rate / 60:.0f} minutes left")
        progress()
        self.store = store


def choose_place(wanted: str, features: Sequence[Features], device: torch.device) -> tuple[str, str]:
    """Where to keep these features, and the reason in words. Allocates nothing.

    "auto" takes a CUDA device where they fit beside ROOM for training, then the host's memory,
    then "off". Raises ValueError when a place that was asked for cannot hold them.
    """
    need = sum(feature.bytes for feature in features)
    text = f"{need / 1e9:.2f} GB of features"
    if wanted == "off":
        return "off", f"off as asked, {text} recomputed in every epoch"
    if wanted == "auto" and not len(features[0].prefix):
        return "off", "off, no stage before the first that learns"
    places = [wanted] if wanted != "auto" else ["device", "host"] if device.type == "cuda" else ["host"]
    free = {place: free_memory(place, device) for place in places}
    for place in places:
        if need + ROOM <= free[place]:
            return place, f"{text} in {place} memory, {free[place] / 1e9:.1f} GB were free"
    found = ", ".join(f"{free[place] / 1e9:.1f} GB free in {place} memory" for place in places)
    shortage = f"{text} and {ROOM / 1e9:.1f} GB for training do not fit ({found})"
    if wanted != "auto":
        raise ValueError(f"--cache {wanted}: {shortage}; try --cache off, --train-size or a smaller --image-size")
    return "off", f"off, {shortage}"


def free_memory(place: str, device: torch.device) -> int:
    """Bytes that can be allocated on the "device" or the "host" without swapping.

    Only a CUDA device has memory of its own here: Apple's GPUs share the host's.
    """
    if place == "device" and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not Path("/proc/meminfo").exists():  # macOS: what is free is not told, half of all is a guess
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")  # a container's own limit; its file cache can be reclaimed
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        free = min(free, int(limit) - int((group / "memory.current").read_text()) + int(cached))
    return free
