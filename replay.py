"""Replay a training step as a CUDA graph: one launch in place of hundreds.

A step of a small network launches some 200 kernels, and where each runs for microseconds the GPU
waits for Python to launch the next one. Recorded once, they are launched together.

    step = Replayed(step)    # step(x, y): forward, backward, optimizer; returns nothing
    for x, y in batches:
        step(x, y)

The step must not wait for the device (no item(), no print of a tensor), must keep what it adds up
in tensors that stay where they are, and its Adam needs capturable=True.
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs)

Imports torch only: copy it into yours.
"""

from collections.abc import Callable

import torch

WARM_UP = 3  # ordinary steps first, in which libraries choose their kernels and Adam makes its state


class Replayed:
    """Calls `step` as it is a few times, then records it, then replays the record. Inputs of
    another shape than the first ones', such as an epoch's odd last batch, get an ordinary step."""

    def __init__(self, step: Callable[..., None]):
        self.step, self.graph, self.inputs, self.calls = step, None, None, 0

    def __call__(self, *inputs: torch.Tensor) -> None:
        if self.inputs is None:
            self.inputs = [tensor.clone() for tensor in inputs]  # where the record reads from
        if [tensor.shape for tensor in inputs] != [tensor.shape for tensor in self.inputs]:
            return self.step(*inputs)
        if self.calls < WARM_UP:  # not on the stream that will be recorded, says the documentation
            self.calls += 1
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                self.step(*inputs)
            return main.wait_stream(side)
        for place, tensor in zip(self.inputs, inputs):
            place.copy_(tensor)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, runs nothing
                self.step(*self.inputs)
        self.graph.replay()
