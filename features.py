"""What the trainable tail sees: the frozen prefix's output for (image, flip), looked up or computed.

The prefix is frozen and in eval mode and the only augmentation is a mirror image, so an image
has exactly two inputs to the tail. Computed once each, they turn every later epoch's pass
through the prefix into a lookup.

    train = Features(prefix, images.pixels, 224, device, dtype, mirrored=True)
    place, why = choose_place("auto", [train], device, Path("features"))
    train.fill(place, Path("features"))
    x = train(indices, flips)                               # the same values, filled or not
    for x in train.batches(128, order, flips):
"""

import functools
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from data import progress, remove_leftovers, transform, whole_file
from machine import free_memory, memory_is_full
from runs import fingerprint

PLACES = ("auto", "device", "host", "disk", "off")
ROOM = 2 * 2**30  # bytes left free for training beside the cache


class Features:
    """The inputs of the tail for one split: `dtype` [B, C, H, W] in channels_last memory.

    prefix: the frozen stages, any module; pixels: uint8 [N, H, W, 3]; mirrored: whether both
    flips will be asked for (training) or only the image itself (test).
    """

    def __init__(self, prefix: nn.Module, pixels: torch.Tensor, image_size: int, device: torch.device,
                 dtype: torch.dtype, mirrored: bool):
        self.prefix = prefix.to(device, dtype, memory_format=torch.channels_last)
        if device.type == "cuda" and pixels.nbytes <= 2**30:  # a small set is looked up there
            pixels = pixels.to(device)
        self.pixels, self.image_size, self.device, self.dtype = pixels, image_size, device, dtype
        # Images per pass: a GPU wants many; on a CPU little memory, used again and again, is 1.19 times as fast.
        self.chunk = 16 if device.type == "cpu" else 256
        self.store = None
        self.copies = deque()  # CUDA events of the last copies out of the host's memory
        one = self.compute(torch.tensor([0]))
        self.shape = (2 * len(pixels) if mirrored else len(pixels), *one.shape[1:])
        self.bytes = one.nbytes * self.shape[0]

    def __len__(self) -> int:
        return len(self.pixels)

    def __call__(self, indices: torch.Tensor, flips: torch.Tensor | bool = False) -> torch.Tensor:
        """Features of the images at `indices`, int64 [B], mirrored where `flips`, bool [B]; the mirror
        image of image i is also image N + i."""
        rows = indices + len(self) * flips
        if self.store is None:
            return self.compute(rows).permute(0, 3, 1, 2)
        rows = rows.to(self.store.device)
        if self.device.type != "cuda" or self.store.is_cuda:
            return self.store.index_select(0, rows).to(self.device).permute(0, 3, 1, 2)
        # Gathered into page-locked memory, out of which the GPU copies by itself, so that gathering
        # a batch hides behind the step before. Two batches ahead at most.
        if len(self.copies) == 2:
            self.copies.popleft().synchronize()
        locked = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype, pin_memory=True)
        found = torch.index_select(self.store, 0, rows, out=locked).to(self.device, non_blocking=True)
        self.copies.append(torch.cuda.current_stream().record_event())
        return found.permute(0, 3, 1, 2)

    def batches(self, size: int, order: torch.Tensor | None = None,
                flips: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """Features of all images, `size` at a time: in `order`, int64 [N], or as they come; mirrored
        where `flips`, bool [N] by image. The order goes to the store's device once, since a
        GPU would wait for each small copy."""
        order = torch.arange(len(self)) if order is None else order
        rows = order if flips is None else order + len(self) * flips[order]
        for some in rows.to((self.pixels if self.store is None else self.store).device).split(size):
            yield self(some)

    @torch.no_grad()
    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        """These rows of the store, int64 [B], computed: [B, H, W, C]."""
        parts = []
        for some in rows.split(self.chunk):
            some = some.to(self.pixels.device)
            pixels = self.pixels.index_select(0, some % len(self)).to(self.device)
            flips = (some >= len(self)).to(self.device)
            parts.append(self.prefix(transform(pixels, self.image_size, self.dtype, flips)))
        return torch.cat(parts).permute(0, 2, 3, 1)

    def fill(self, place: str, folder: Path) -> int:
        """Compute every feature once and keep it on the "device", on the "host" or, for "disk", in a
        file in `folder`, where later runs find it; "off" keeps nothing. Returns how many were
        computed. Raises OSError if the file cannot be written."""
        if place == "off":
            return 0
        if place == "disk":
            file = folder / self.name
            if self.found(file):
                return 0
            try:
                with whole_file(file) as part, open(part, "wb") as out:
                    for _, block in self.blocks():
                        out.write(block.cpu().contiguous().view(torch.uint8).numpy())
                    out.flush()
                    os.fsync(out.fileno())  # on the disk before it has its name: only some rows are checked later
            except OSError as error:
                raise OSError(f"cannot write {file} ({error.strerror}): try --cache off") from error
            if not self.found(file):
                raise OSError(f"{file} does not hold what was written to it")
        else:
            store = torch.empty(self.shape, dtype=self.dtype, device=self.device if place == "device" else "cpu")
            for first, block in self.blocks():
                store[first:first + len(block)] = block
            self.store = store
        return len(self.store)

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Every row of the store, computed, a chunk at a time, with its first row's number."""
        start, total = time.monotonic(), self.shape[0]
        for rows in torch.arange(total).split(self.chunk):
            yield rows[0].item(), self.compute(rows)
            done = rows[-1].item() + 1
            rate = done / (time.monotonic() - start)
            progress(f"filling the cache: {done:,} of {total:,} images, {rate:,.0f} a second, "
                     f"{(total - done) / rate / 60:.0f} minutes left")
        progress()

    @functools.cached_property
    def name(self) -> str:
        """The name of these features' file: a hash of all that they depend on."""
        settings = repr((self.prefix, self.shape, self.image_size, self.dtype, self.device.type))
        return f"{fingerprint(*self.prefix.state_dict().values(), self.pixels, text=settings)}.features"

    def found(self, file: Path) -> bool:
        """Takes a file as the store if it is whole and some rows are what the prefix computes now."""
        if not file.is_file() or file.stat().st_size != self.bytes:
            return False
        store = torch.from_file(str(file), size=self.bytes // self.dtype.itemsize, dtype=self.dtype).view(self.shape)
        rows = torch.linspace(0, len(store) - 1, 16).long()
        expected = self.compute(rows).cpu()
        if not (store[rows] - expected).norm() <= 0.01 * expected.norm():
            return False
        self.store = store
        return True


def fill_all(features: Sequence[Features], place: str, device: torch.device, folder: Path) -> tuple[str, int]:
    """Fill them, in the next place if memory runs out in this one after all. Returns where they
    are now, and how many features were computed."""
    try:
        return place, sum(feature.fill(place, folder) for feature in features)
    except (RuntimeError, MemoryError) as error:
        if not memory_is_full(error):
            raise
        for feature in features:
            feature.store = None
    after = choose_place("auto", features, torch.device("cpu"), folder)[0] if place == "device" else "off"
    progress()
    print(f"         does not fit after all (--cache {place}): {after}", flush=True)
    return fill_all(features, after, device, folder)


def choose_place(wanted: str, features: Sequence[Features], device: torch.device, folder: Path) -> tuple[str, str]:
    """Where to keep these features, and the reason in words: "auto" takes a CUDA device where they fit
    beside ROOM for training, then the host's memory, then "off"; "disk", in `folder`, is for who asks
    for it, since it stays. Raises ValueError when a place that was asked for cannot hold them."""
    need = sum(feature.bytes for feature in features)
    text = f"{need / 1e9:.2f} GB of features"
    room = ROOM
    if wanted == "disk":  # what is there takes no more room
        remove_leftovers(folder)
        need -= sum(feature.bytes for feature in features if (folder / feature.name).exists())
        room = ROOM // 8 if need else 0  # for the checkpoints
    if wanted == "off":
        return "off", f"off as asked, {text} recomputed in every epoch"
    if wanted == "auto" and not len(features[0].prefix):
        return "off", "off, no stage whose output stays the same"
    places = [wanted] if wanted != "auto" else ["device", "host"] if device.type == "cuda" else ["host"]
    where = {"device": "in device memory", "host": "in host memory", "disk": f"in {folder}"}
    free = {place: free_memory(place, device, folder) for place in places}
    for place in places:
        if need + room <= free[place]:
            return place, f"{text} {where[place]}, {free[place] / 1e9:.1f} GB were free"
    found = ", ".join(f"{free[place] / 1e9:.1f} GB free {where[place]}" for place in places)
    beside = "checkpoints" if wanted == "disk" else "training"
    shortage = f"{text} and {room / 1e9:.1f} GB for {beside} do not fit ({found})"
    if wanted != "auto":
        raise ValueError(f"--cache {wanted}: {shortage}; try --cache off, --train-size or a smaller --image-size")
    return "off", f"off, {shortage}; --cache disk takes a file"
