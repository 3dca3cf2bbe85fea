"""The bookkeeping of replay.Replayed, with a recorder in CUDA's place: what is recorded when, from where it
reads, and that every batch counts once. tests/test_cuda.py has the real thing."""

from contextlib import contextmanager

import pytest
import torch

import replay


@pytest.fixture
def recorder(monkeypatch):
    """torch.cuda's graphs and streams, played by lists: steps run while recording note themselves instead."""

    class Graph:
        def replay(self):
            for step in self.recorded:
                step()

    class Stream:
        def wait_stream(self, other):
            assert other is not self

    @contextmanager
    def record(graph):
        graph.recorded = recorder.recorded = []
        yield
        recorder.recorded = None

    class recorder:
        recorded = None

        @staticmethod
        def step(x, y):  # as a kernel would: now, or when the record is replayed
            def add():
                recorder.sums.append((float(x.sum()), float(y.sum())))
            recorder.kinds.append("ordinary" if recorder.recorded is None else "recorded")
            add() if recorder.recorded is None else recorder.recorded.append(add)

        sums, kinds = [], []

    main = Stream()
    for name, fake in {"CUDAGraph": Graph, "graph": record, "Stream": Stream, "current_stream": lambda: main,
                       "stream": lambda stream: contextmanager(lambda: (yield))()}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return recorder


def test_every_batch_counts_once_and_is_recorded_once(recorder):
    batches = [(torch.full((4, 2), float(i)), torch.full((4,), i)) for i in range(1, 9)]
    batches[4] = (torch.full((3, 2), 5.0), torch.full((3,), 5))  # an odd last batch, and epochs go on after it
    step = replay.Replayed(recorder.step)
    for x, y in batches:
        step(x, y)
        x.zero_()  # what was handed over may change
    assert recorder.kinds == ["ordinary"] * replay.WARM_UP + ["recorded", "ordinary"]
    assert recorder.sums == [(8.0 * i, 4.0 * i) if i != 5 else (30.0, 15.0) for i in range(1, 9)]


def test_the_layout_of_the_inputs_is_kept(recorder):
    step = replay.Replayed(recorder.step)
    step(torch.rand(2, 4, 5, 6).to(memory_format=torch.channels_last), torch.ones(2))
    assert step.inputs[0].is_contiguous(memory_format=torch.channels_last)
