"""The bookkeeping of graph.CudaGraphStep, with a recorder in CUDA's place: what is recorded when,
from where it reads, and that every batch counts once. test_cuda.py has the real thing."""

import random
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from plumbing import graph

WARM = graph.WARM_UP_STEPS
ALPHA = 0.5  # which a step below reads
RANDOM = np.random.default_rng(0)


class Recorder:
    """A step that notes itself while it is recorded, as a kernel would, and adds when it runs."""

    def __init__(self):
        self.recorded, self.sums, self.kinds, self.said = None, [], [], []
        self.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        rate = self.optimizer.param_groups[0]["lr"]

        def add():
            self.sums.append((float(x.sum()), float(y.sum()), round(float(rate), 6)))

        if self.recorded is None:
            self.kinds.append("ordinary")
            add()
        else:
            self.kinds.append("recorded")
            self.recorded.append(add)

    def make(self, step=None) -> graph.CudaGraphStep:
        made = graph.CudaGraphStep(step or self.step, self.model, self.optimizer, self.said.append)
        self.call = made
        return made

    def run(self, count: int, rows: int = 4) -> list[str]:
        """Calls the step, and gives what kinds of steps that came to."""
        before = len(self.kinds)
        for _ in range(count):
            self.call(torch.ones(rows, 2), torch.ones(rows))
        return self.kinds[before:]


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

    def set_mode(mode) -> None:  # as torch does, once in a process
        warnings.warn("the mode does not yet detect all synchronizing operations", stacklevel=1)

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
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return recorder


def test_every_batch_counts_once_and_is_recorded_once(recorder):
    batches = [(torch.full((4, 2), float(i)), torch.full((4,), i)) for i in range(1, 9)]
    batches[4] = (torch.full((3, 2), 5.0), torch.full((3,), 5))  # an odd last batch; more epochs
    step = recorder.make()
    for x, y in batches:
        step(x, y)
        x.zero_()  # what was handed over may change
    expected = [(8.0 * i, 4.0 * i, 0.1) for i in range(1, 9)]
    expected[4] = (30.0, 15.0, 0.1)
    assert recorder.kinds == ["ordinary"] * WARM + ["recorded", "ordinary"]
    assert recorder.sums == expected


def test_the_layout_of_the_inputs_is_kept(recorder):
    step = recorder.make()
    step(torch.rand(2, 4, 5, 6).to(memory_format=torch.channels_last), torch.ones(2))
    assert step.inputs[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_rate_that_changes_is_taken_without_a_new_record(recorder):
    """Adam reads it from the device; a scheduler sees plain numbers."""
    recorder.make()
    recorder.run(WARM + 2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(recorder.optimizer, 0.5)
    for _ in range(3):
        assert not recorder.run(1)
        scheduler.step()
    assert [rate for _, _, rate in recorder.sums[-4:]] == [0.1, 0.1, 0.05, 0.025]
    assert isinstance(recorder.optimizer.param_groups[0]["lr"], float)


def test_a_rate_of_an_optimizer_that_takes_no_tensor_makes_a_new_record(recorder):
    recorder.optimizer = torch.optim.SGD(recorder.model.parameters(), lr=0.1)
    recorder.make()
    recorder.run(WARM + 2)
    recorder.optimizer.param_groups[0]["lr"] = 0.05
    assert recorder.run(graph.RECORDS_TO_PAY) == ["ordinary"] * WARM + ["recorded"]
    assert recorder.sums[-1][2] == 0.05


def test_what_changes_in_every_step_is_not_recorded_again_and_again(recorder):
    recorder.optimizer = torch.optim.SGD(recorder.model.parameters(), lr=0.1)
    recorder.make()
    for number in range(40):
        recorder.run(1)
        if number > WARM:
            recorder.optimizer.param_groups[0]["lr"] *= 0.9
    assert recorder.kinds.count("recorded") <= 3 and len(recorder.sums) == 40
    rates = [rate for _, _, rate in recorder.sums]
    assert rates[-1] == round(0.1 * 0.9 ** (39 - WARM - 1), 6)


@pytest.mark.parametrize("change", ["weight decay", "what learns", "mode"])
def test_what_a_record_depends_on_makes_a_new_one(recorder, change):
    recorder.make()
    recorder.run(WARM + 3)
    if change == "weight decay":
        recorder.optimizer.param_groups[0]["weight_decay"] = 0.1
    if change == "what learns":  # gradual unfreezing
        recorder.model[0].requires_grad_(False)
    if change == "mode":
        recorder.model.eval()
    assert recorder.run(WARM + 2) == ["ordinary"] * WARM + ["recorded"]
    assert recorder.run(5) == []


def test_a_number_that_the_step_reads_from_its_module_makes_a_new_record(recorder, monkeypatch):
    def step(x, y):
        recorder.step(x * halved(), y)

    recorder.make(step)
    recorder.run(WARM + 2)
    monkeypatch.setitem(globals(), "ALPHA", 0.25)
    assert recorder.run(WARM + 2) == ["ordinary"] * WARM + ["recorded"]
    assert recorder.sums[-1][0] == 2.0


def halved() -> float:
    return ALPHA


DRAWS = {
    "random": lambda: random.random(),
    "numpy": lambda: np.random.random(),
    "torch": lambda: torch.rand(1),
    "a generator of the module": lambda: RANDOM.beta(0.2, 0.2),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_a_step_that_draws_on_the_cpu_is_not_recorded(recorder, draw):
    """As mixup does, with NumPy: the record would have the same number for ever."""
    one = DRAWS[draw]
    step = {
        "random": lambda x, y: recorder.step(x * random.random(), y),
        "numpy": lambda x, y: recorder.step(x * np.random.random(), y),
        "torch": lambda x, y: recorder.step(x * torch.rand(1), y),
        "a generator of the module": lambda x, y: recorder.step(x * RANDOM.beta(2, 2), y),
    }[draw]
    assert one() is not None
    recorder.make(step)
    recorder.run(10)
    assert recorder.kinds == ["ordinary"] * 10
    assert recorder.said == [
        "graph    left out, every step is launched anew: it draws random numbers on the CPU"
    ]


def test_a_step_that_waits_for_the_device_is_not_recorded(recorder):
    """As GradScaler does for an optimizer that takes no tensors of it: item() in a recording would
    end all use of the GPU."""

    def step(x, y):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        recorder.step(x, y)

    recorder.make(step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorder.run(10)
    assert recorder.kinds == ["ordinary"] * 10
    (line,) = recorder.said
    assert "it waits for the device" in line


def test_an_optimizer_is_made_ready_for_the_graph_whatever_it_is():
    """A state that a CPU kept says capturable=False, without which no graph is recorded."""
    weights = [nn.Parameter(torch.zeros(1))]
    adam, sgd = torch.optim.Adam(weights), torch.optim.SGD(weights)
    assert graph.make_capturable(adam)[0] is not None
    assert graph.make_capturable(sgd) == [None]
    assert adam.param_groups[0]["capturable"] is True
    assert "capturable" not in sgd.param_groups[0]
