"""The bookkeeping of graph.CudaGraphStep, with a recorder in CUDA's place: what is recorded when, from
where it reads, and that every batch counts once. test_cuda.py has the real thing."""

from contextlib import contextmanager

import pytest
import torch

from plumbing import graph


class Recorder:
    """A step that notes itself while it is recorded, as a kernel would, and adds when it runs."""

    def __init__(self):
        self.recorded, self.sums, self.kinds = None, [], []

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        def add():
            self.sums.append((float(x.sum()), float(y.sum())))

        if self.recorded is None:
            self.kinds.append("ordinary")
            add()
        else:
            self.kinds.append("recorded")
            self.recorded.append(add)


@pytest.fixture
def recorder(monkeypatch):
    """torch.cuda's graphs and streams, played by lists."""
    recorder = Recorder()

    class Graph:
        def replay(self):
            for step in self.recorded:
                step()

    class Stream:
        def wait_stream(self, other):
            assert other is not self

    @contextmanager
    def record(graph, stream):
        assert stream in warmed_up_on
        graph.recorded = recorder.recorded = []
        yield
        recorder.recorded = None

    warmed_up_on = []

    @contextmanager
    def stream(side):
        warmed_up_on.append(side)
        yield

    main = Stream()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return recorder


def test_every_batch_counts_once_and_is_recorded_once(recorder):
    batches = [(torch.full((4, 2), float(i)), torch.full((4,), i)) for i in range(1, 9)]
    batches[4] = (torch.full((3, 2), 5.0), torch.full((3,), 5))  # an odd last batch; more epochs
    step = graph.CudaGraphStep(recorder.step)
    for x, y in batches:
        step(x, y)
        x.zero_()  # what was handed over may change
    expected = [(8.0 * i, 4.0 * i) for i in range(1, 9)]
    expected[4] = (30.0, 15.0)
    assert recorder.kinds == ["ordinary"] * graph.WARM_UP + ["recorded", "ordinary"]
    assert recorder.sums == expected


def test_the_layout_of_the_inputs_is_kept(recorder):
    step = graph.CudaGraphStep(recorder.step)
    step(torch.rand(2, 4, 5, 6).to(memory_format=torch.channels_last), torch.ones(2))
    assert step.inputs[0].is_contiguous(memory_format=torch.channels_last)


def test_an_optimizer_is_made_ready_for_the_graph_whatever_it_is():
    """A state that a CPU kept says capturable=False, without which no graph is recorded."""
    weights = [torch.nn.Parameter(torch.zeros(1))]
    adam, sgd = torch.optim.Adam(weights), torch.optim.SGD(weights)
    for optimizer in (adam, sgd):
        graph.capturable(optimizer)
    assert adam.param_groups[0]["capturable"] is True
    assert "capturable" not in sgd.param_groups[0]
