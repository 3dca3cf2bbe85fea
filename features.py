"""What the trainable tail sees: the frozen prefix's output for (image, flip), computed once.

    prefix, tail = freeze.split(model, "layer4")
    inputs = Features(prefix, train.pixels, 224, device, torch.bfloat16, mirrored=True)
    inputs.fill(device)                                        # once
    order, flips = epoch_order(len(inputs), seed=0, epoch=1)   # in every epoch
    for x, y in zip(inputs.batches(128, order, flips), train.labels[order].split(128)):
        loss = F.cross_entropy(tail(x), y)

The prefix is frozen and in eval mode and the only augmentation is a mirror image, so an image
has exactly two inputs to the tail. Computed once each, they turn every later epoch's pass
through the prefix into a lookup.

Imports torch and `transform` of data.py, nothing else of this repository: copy both into yours.
"""

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import nn

from data import transform

SMALL = 2**30  # bytes of pixels that a GPU holds itself, to look them up without waiting


class Features:
    """The inputs of the tail for one split: `dtype` [B, C, H, W] in channels_last memory.

    prefix: the frozen stages, any module; pixels: uint8 [N, H, W, 3]; mirrored: whether both
    flips will be asked for (training) or only the image itself (test).
    """

    def __init__(
        self,
        prefix: nn.Module,
        pixels: torch.Tensor,
        image_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
        mirrored: bool,
    ):
        device = torch.device(device)
        self.prefix = prefix.to(device, dtype, memory_format=torch.channels_last)
        self.pixels, self.image_size, self.device, self.dtype = pixels, image_size, device, dtype
        self.chunk = 16  # images per pass: on a CPU little memory, used again and again, is best
        if device.type != "cpu":
            self.chunk = 256
        if device.type == "cuda" and pixels.nbytes <= SMALL:
            self.pixels = pixels.to(device)
        self.store = None  # [rows, H, W, C]: image i, and from row N on its mirror image
        self.copies = deque()  # CUDA events of the last copies out of the host's memory
        one = self.compute(torch.tensor([0]))
        self.shape = (len(pixels) * (1 + mirrored), *one.shape[1:])
        self.bytes = one.nbytes * self.shape[0]

    def __len__(self) -> int:
        return len(self.pixels)

    def __call__(self, indices: torch.Tensor, flips: torch.Tensor | bool = False) -> torch.Tensor:
        """Features of the images at `indices`, int64 [B], mirrored where `flips`, bool [B]."""
        rows = indices + len(self) * flips
        if self.store is None:
            found = self.compute(rows)
        elif self.device.type == "cuda" and not self.store.is_cuda:
            found = self.copy_to_gpu(rows)
        else:
            found = self.store.index_select(0, rows.to(self.store.device)).to(self.device)
        return found.permute(0, 3, 1, 2)

    def batches(
        self,
        size: int | list[int],
        order: torch.Tensor | None = None,
        flips: torch.Tensor | None = None,
    ) -> Iterator[torch.Tensor]:
        """Features of all images, `size` at a time, or as many as each of `size`: in `order`,
        int64 [N], or as they come; mirrored where `flips`, bool [N] by image."""
        rows = torch.arange(len(self)) if order is None else order
        if flips is not None:
            rows = rows + len(self) * flips[rows]
        source = self.pixels if self.store is None else self.store
        for some in rows.to(source.device).split(size):  # sent once: a GPU waits for each copy
            yield self(some)

    @torch.no_grad()
    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        """These rows of the store, int64 [B], computed: [B, H, W, C]."""
        count, parts = len(rows), []
        if self.device.type == "cuda":  # cuDNN searches anew for every size: let there be 8 of them
            rows = torch.cat([rows, rows[:1].expand(-count % 32)])
        for some in rows.to(self.pixels.device).split(self.chunk):
            pixels = self.pixels.index_select(0, some % len(self)).to(self.device)
            flips = (some >= len(self)).to(self.device)
            parts.append(self.prefix(transform(pixels, self.image_size, self.dtype, flips)))
        return torch.cat(parts)[:count].permute(0, 2, 3, 1)

    def copy_to_gpu(self, rows: torch.Tensor) -> torch.Tensor:
        """These rows out of the host's memory, gathered into page-locked memory, from which the
        GPU copies by itself: gathering a batch hides behind the step before. Two batches ahead
        at most."""
        if len(self.copies) == 2:
            self.copies.popleft().synchronize()
        shape = (len(rows), *self.shape[1:])
        locked = torch.empty(shape, dtype=self.dtype, pin_memory=True)
        torch.index_select(self.store, 0, rows.cpu(), out=locked)
        found = locked.to(self.device, non_blocking=True)
        self.copies.append(torch.cuda.current_stream().record_event())
        return found

    def blocks(self, report: Callable[[int, int], None] | None = None) -> Iterator[torch.Tensor]:
        """Every row of the store, computed, a chunk at a time. report(done, of) hears of each."""
        total = self.shape[0]
        for rows in torch.arange(total).split(self.chunk):
            yield self.compute(rows)
            if report:
                report(rows[-1].item() + 1, total)

    def fill(self, device: torch.device, report: Callable[[int, int], None] | None = None) -> None:
        """Compute every feature once and keep it on `device`, the GPU or the CPU."""
        store, done = torch.empty(self.shape, dtype=self.dtype, device=device), 0
        for block in self.blocks(report):
            store[done : done + len(block)] = block
            done += len(block)
        self.store = store
