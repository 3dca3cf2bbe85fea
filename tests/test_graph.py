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

ANEW = ["ordinary"] * graph.WARM_UP_STEPS + ["recorded"]
ALPHA = 0.5  # which a step below reads
RANDOM = np.random.default_rng(0)
FACTOR = None  # what another step multiplies by


class Recorder:
    """A step that notes itself while it is recorded, as a kernel would, and adds when it runs."""

    def __init__(self):
        self.recorded, self.sums, self.kinds, self.said = None, [], [], []
        self.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def make(self, step=None, optimizer=torch.optim.Adam) -> graph.CudaGraphStep:
        self.optimizer = optimizer(self.model.parameters(), lr=0.1)
        (self.group,) = self.optimizer.param_groups
        step = step or self.step
        self.call = graph.CudaGraphStep(step, self.model, self.optimizer, self.said.append)
        return self.call

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        rate = self.group["lr"]

        def add():
            self.sums.append((float(x.sum()), float(y.sum()), round(float(rate), 6)))

        if self.recorded is None:
            self.kinds.append("ordinary")
            add()
        else:
            self.kinds.append("recorded")
            self.recorded.append(add)

    def run(self, count: int) -> list[str]:
        """Calls the step, and gives what kinds of steps that came to."""
        before = len(self.kinds)
        for _ in range(count):
            self.call(torch.ones(4, 2), torch.ones(4))
        return self.kinds[before:]


@pytest.fixture
def recorder(monkeypatch):
    """torch.cuda's graphs and streams, played by lists."""
    recorder, warmed_up_on = Recorder(), []

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

    @contextmanager
    def on_stream(side):
        warmed_up_on.append(side)
        yield

    def set_mode(mode) -> None:  # as torch does, once in a process
        warnings.warn("the mode does not yet detect all synchronizing operations", stacklevel=1)

    main = Stream()
    played = {"CUDAGraph": Graph, "graph": record, "Stream": Stream, "stream": on_stream}
    played |= {"current_stream": lambda: main, "get_sync_debug_mode": lambda: 0}
    for name, player in (played | {"set_sync_debug_mode": set_mode}).items():
        monkeypatch.setattr(torch.cuda, name, player)
    return recorder


def test_every_batch_counts_once_and_is_recorded_once(recorder):
    step, batches = recorder.make(), []
    for number in range(1, 9):
        size = 3 if number == 5 else 4  # an odd last batch, and another epoch
        x = torch.full((size, 3, 2, 2), float(number)).to(memory_format=torch.channels_last)
        batches.append((x, torch.full((size,), number)))
    for x, y in batches:
        step(x, y)
        x.zero_()  # what was handed over may change
    expected = [(48.0 * number, 4.0 * number, 0.1) for number in range(1, 9)]
    expected[4] = (180.0, 15.0, 0.1)
    assert recorder.kinds == ANEW + ["ordinary"] and recorder.sums == expected
    assert not any(x.any() for x, _ in batches)  # nothing has been written into them
    assert step.inputs[0].is_contiguous(memory_format=torch.channels_last)


def test_a_group_that_is_added_later_is_recorded_with_a_rate_of_its_own(recorder):
    step = recorder.make()
    recorder.run(graph.WARM_UP_STEPS + 2)
    recorder.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.3})
    assert recorder.run(graph.WARM_UP_STEPS + 2) == ANEW
    assert [rate.item() for rate in step.rate_tensors] == pytest.approx([0.1, 0.3])
    assert recorder.optimizer.param_groups[1]["capturable"]


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_rate_that_changes_is_taken_without_a_new_record(recorder):
    """Adam reads it from the device; a scheduler sees plain numbers."""
    recorder.make()
    recorder.run(graph.WARM_UP_STEPS + 2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(recorder.optimizer, 0.5)
    for _ in range(3):
        assert not recorder.run(1)
        scheduler.step()
    assert [rate for _, _, rate in recorder.sums[-4:]] == [0.1, 0.1, 0.05, 0.025]
    assert isinstance(recorder.group["lr"], float)


def test_what_changes_in_every_step_is_not_recorded_again_and_again(recorder):
    recorder.make(optimizer=torch.optim.SGD)
    for number in range(40):
        recorder.run(1)
        if number > graph.WARM_UP_STEPS:
            recorder.group["lr"] *= 0.9
    assert recorder.kinds.count("recorded") <= 3 and len(recorder.sums) == 40
    assert recorder.sums[-1][2] == round(0.1 * 0.9 ** (39 - graph.WARM_UP_STEPS - 1), 6)
    assert "changes too often" in recorder.said[0]


CHANGES = {
    "a rate": lambda recorder, _: recorder.group.update(lr=0.05),
    "weight decay": lambda recorder, _: recorder.group.update(weight_decay=0.1),
    "what learns": lambda recorder, _: recorder.model[0].requires_grad_(False),
    "mode": lambda recorder, _: recorder.model.eval(),
    "a module's number": lambda recorder, _: setattr(recorder.model[1], "momentum", 0.2),
    "a number that the step reads": lambda _, patch: patch.setitem(globals(), "ALPHA", 0.25),
}


def read_by_a_function() -> float:
    return ALPHA


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_record_depends_on_makes_a_new_one(recorder, monkeypatch, change):
    """Of SGD, whose rate is no tensor."""
    recorder.make(lambda x, y: recorder.step(x * read_by_a_function(), y), torch.optim.SGD)
    recorder.run(graph.WARM_UP_STEPS + 3)
    CHANGES[change](recorder, monkeypatch)
    assert recorder.run(graph.WARM_UP_STEPS + 5) == ANEW
    alpha, rate = recorder.sums[-1][0] / 8, recorder.sums[-1][2]
    assert alpha == ALPHA and rate == recorder.group["lr"]


def waits() -> float:
    """As GradScaler does for SGD. item() in a recording would end all use of the GPU."""
    warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    return 1.0


DRAWS, WAITS = "it draws random numbers on the CPU", "it waits for the device, as item()"


@pytest.mark.parametrize(
    "factor, why",
    [
        (lambda: random.random(), DRAWS),
        (lambda: np.random.random(), DRAWS),  # as mixup does
        (lambda: torch.rand(1), DRAWS),
        (lambda: RANDOM.beta(2, 2), DRAWS),
        (lambda: waits(), WAITS),
    ],
    ids=["random", "numpy", "torch", "a generator of the module", "waits"],
)
@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_a_step_that_draws_on_the_cpu_or_waits_is_not_recorded(recorder, monkeypatch, factor, why):
    monkeypatch.setitem(globals(), "FACTOR", factor)
    recorder.make(lambda x, y: recorder.step(x * FACTOR(), y))
    assert recorder.run(10) == ["ordinary"] * 10
    (line,) = recorder.said
    assert line.startswith(f"graph    left out, every step is launched anew: {why}")


def test_an_optimizer_counts_on_the_gpu_or_that_is_noticed():
    """A state that a CPU kept says capturable=False, without which no graph is recorded."""
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    adam, sgd = torch.optim.Adam([weight]), torch.optim.SGD([weight])
    adam.step(), sgd.step()
    assert graph.counts_on_cpu(adam) and not graph.counts_on_cpu(sgd)
    assert len(graph.make_capturable(adam)) == 1 and graph.make_capturable(sgd) == []
    assert adam.param_groups[0]["capturable"] and "capturable" not in sgd.param_groups[0]
