"""Features of one split of a data set in several pieces, each kept where it fits.

pieces = [piece(inputs, 0, 30_000), piece(inputs, 30_000, 20_000)]
pieces[0].fill("cuda")                  # the second one is computed anew whenever it is asked
inputs = joined(pieces)                 # to be looked up as Features are
"""

import copy
import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from features import Features


def piece(features: Features, first: int, count: int) -> Features:
    """Features of `count` of the images, from `first` on, not filled."""
    if count == len(features):
        return features
    part = copy.copy(features)
    part.pixels, part.copies = features.pixels[first : first + count], deque()
    part.shape = (features.shape[0] // len(features) * count, *features.shape[1:])
    part.bytes = features.bytes // len(features) * count
    return part


def joined(pieces: Sequence[Features]) -> "Features | Joined":
    """One piece is itself: nothing is to be gathered."""
    return pieces[0] if len(pieces) == 1 else Joined(pieces)


def waits(part: Features) -> bool:
    return part.store is None or part.store.is_cuda


class Joined:
    """Looks up what Features look up, in pieces that follow each other."""

    def __init__(self, pieces: Sequence[Features]):
        self.pieces = pieces
        firsts = itertools.accumulate([0, *map(len, pieces[:-1])])
        # What waits for no GPU comes first, while the GPU is still busy with the step before.
        self.hosted_first = sorted(zip(firsts, pieces), key=lambda pair: waits(pair[1]))

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def __call__(self, indices: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
        """Features [B, C, H, W] of the images at `indices`, int64 [B], mirrored where `flips`,
        bool [B]; both on the CPU, where they are sorted by piece."""
        one = self.pieces[0]
        batch, height, width, channels = len(indices), *one.shape[1:]
        found = torch.empty((batch, height, width, channels), dtype=one.dtype, device=one.device)
        found = found.permute(0, 3, 1, 2)
        for first, part in self.hosted_first:
            inside = (indices >= first) & (indices < first + len(part))
            places = inside.nonzero().flatten()
            if len(places):
                here = part(indices[places] - first, flips[places])
                found[places.to(one.device)] = here
        return found

    def batches(
        self,
        size: int | list[int],
        order: torch.Tensor | None = None,
        flips: torch.Tensor | None = None,
    ) -> Iterator[torch.Tensor]:
        """Features of all images, as Features.batches gives them."""
        rows = torch.arange(len(self)) if order is None else order
        mirrored = torch.zeros(len(self), dtype=torch.bool) if flips is None else flips
        for some in rows.split(size):
            yield self(some, mirrored[some])
