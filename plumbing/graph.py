"""Replay a training step as a CUDA graph: one launch in place of hundreds.

A step launches some 200 kernels, and where each runs for microseconds the GPU waits for Python to
launch the next one. Recorded once, they are launched together: on an H100 a step of fc+layer4 takes
1.1 ms in place of 4.1, of fc+layer3+layer4 2.3 in place of 6.2.

    step = CudaGraphStep(step, tail, optimizer)   # step(x, y): forward, backward, update
    for x, y in batches:
        total += step(x, y)                       # returns a tensor

A record repeats kernels with the values that they had. So it is made anew when one of these has
changed: a value of the optimizer, a mode (train or eval), which parameters learn, a number of a
module, a name of the step's own module that it reads. A step that waits for the device (item(), a
printed tensor), or that draws random numbers or counts on the CPU, is not recorded: it runs as it
is, which is said once. Whatever else Python does in a step, it does once only.
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs)

Imports torch and numpy only: copy it into yours.
"""

import functools
import random
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

WARM_UP_STEPS = 3  # ordinary ones first, in which libraries choose their kernels and Adam its state
STEPS_TO_PAY = 20  # a record that is replayed less often has not been worth its making


class CudaGraphStep:
    """Calls `step` as it is a few times, then records it, then replays the record. An epoch's last
    batch, of another shape than the first, gets an ordinary step. What a call returns is
    overwritten by the next one. say: is called with a line if nothing can be recorded."""

    def __init__(
        self,
        step: Callable[..., torch.Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        say: Callable[[str], None] = print,
    ):
        self.step, self.optimizer, self.say = step, optimizer, say
        self.parameters, self.modules = list(model.parameters()), list(model.modules())
        self.graph, self.inputs, self.output = None, None, None
        self.stream = torch.cuda.Stream()  # one to warm up and to record on
        self.recordable, self.warm_steps, self.replays, self.wasted_records = True, 0, 0, 0
        self.depends_on, self.values_read = None, []
        self.rate_tensors, self.rates = make_capturable(optimizer), None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self.inputs is None:
            self.inputs = [tensor.clone() for tensor in inputs]  # where the record reads from
        if [x.shape for x in inputs] != [x.shape for x in self.inputs]:
            return self.odd_step(inputs)
        if not self.recordable:
            return self.step(*inputs)
        self.notice_changes()
        if self.warm_steps < WARM_UP_STEPS:
            return self.warm_up(inputs)
        for place, tensor in zip(self.inputs, inputs):
            place.copy_(tensor)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        if rates != self.rates:
            for tensor, rate in zip(self.rate_tensors, rates):
                tensor.fill_(rate)
            self.rates = rates
        if self.graph is None:
            self.record()
        self.graph.replay()
        self.replays += 1
        return self.output

    def odd_step(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """An ordinary step of an epoch's last batch, for which cuDNN need not search."""
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
        try:
            return self.step(*inputs)
        finally:
            torch.backends.cudnn.benchmark = before

    def notice_changes(self) -> None:
        """Drops a record that no longer does what the step would do."""
        if self.state() == self.depends_on:
            return
        if self.depends_on is not None and self.replays < STEPS_TO_PAY:
            self.wasted_records += 1
            if self.wasted_records == 3:
                self.give_up("what it depends on, such as a rate, changes too often")
        self.rate_tensors, self.rates = make_capturable(self.optimizer), None  # of new groups too
        self.depends_on, self.graph, self.warm_steps, self.replays = self.state(), None, 0, 0

    def state(self) -> tuple:
        """All that a record depends on and that may change between two steps."""
        learns = [parameter.requires_grad for parameter in self.parameters]
        modes = [plain_values(vars(module)) for module in self.modules]  # training, momentum, p
        skipped = {"params", "initial_lr"}
        if self.rate_tensors:
            skipped.add("lr")  # read from a tensor, which is filled anew
        groups = [group.items() for group in self.optimizer.param_groups]
        values = [[item for item in group if item[0] not in skipped] for group in groups]
        read = list(read_by(self.step))
        self.values_read = [value for _, value in read]  # so that none is freed and its id reused
        names = [(name, value if is_plain(value) else id(value)) for name, value in read]
        return learns, modes, values, names

    def warm_up(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """An ordinary step, not on the default stream, as documented; the last one is watched."""
        self.warm_steps += 1
        step = self.step if self.warm_steps < WARM_UP_STEPS else self.watch
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            output = step(*inputs)
        main.wait_stream(self.stream)
        return output

    def watch(self, *inputs: torch.Tensor) -> torch.Tensor:
        """A step, and whether it waits for the device, counts on the CPU or draws numbers there."""
        before, mode = random_states(self.step), torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                output = self.step(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        if any("called a synchronizing" in str(warning.message) for warning in caught):
            self.give_up("it waits for the device, as item() and a printed tensor do")
        if counts_on_cpu(self.optimizer):
            self.give_up("its optimizer counts its steps on the CPU")
        if random_states(self.step) != before:
            self.give_up("it draws random numbers on the CPU")
        return output

    def record(self) -> None:
        """Records the step, which runs nothing. Its rates are tensors meanwhile, if the optimizer
        takes them, so that a schedule needs no new record."""
        graph = torch.cuda.CUDAGraph()
        try:
            for group, tensor in zip(self.optimizer.param_groups, self.rate_tensors):
                group["lr"] = tensor
            with torch.cuda.graph(graph, stream=self.stream):
                self.output = self.step(*self.inputs)
        finally:
            for group, rate in zip(self.optimizer.param_groups, self.rates):
                group["lr"] = rate
        self.graph = graph

    def give_up(self, why: str) -> None:
        if self.recordable:
            self.say(f"graph    left out, every step is launched anew: {why}")
        self.recordable, self.graph = False, None


def make_capturable(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Has an optimizer count its steps on the GPU, if it counts them (Adam does, SGD does not).
    Gives a rate on the device for each group of an optimizer that takes them, otherwise none."""
    warnings.filterwarnings("ignore", message=".*capturable=True can impair")  # before the record
    groups = optimizer.param_groups
    for group in groups:
        if "capturable" in group:
            group["capturable"] = True
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return []
    return [torch.zeros((), device=group["params"][0].device) for group in groups]


def own_function(step: Callable) -> Callable:
    """The function inside functools.partial."""
    while isinstance(step, functools.partial):
        step = step.func
    return step


def read_by(step: Callable) -> Iterator[tuple[str, object]]:
    """What a step, and other functions of its module that it names, read there, by name."""
    module, unread, seen = own_function(step).__module__, [own_function(step)], set()
    while unread:
        function = unread.pop()
        if function in seen or not hasattr(function, "__code__"):
            continue
        seen.add(function)
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            yield name, value
            if getattr(own_function(value), "__module__", None) == module:
                unread.append(own_function(value))


def is_plain(value: object) -> bool:
    return isinstance(value, (float, int, str))


def plain_values(names: dict) -> dict:
    return {name: value for name, value in names.items() if is_plain(value)}


def counts_on_cpu(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's state has numbers that a record would not count on."""
    for state in optimizer.state.values():
        for value in state.values():
            if is_plain(value) or (isinstance(value, torch.Tensor) and not value.is_cuda):
                return True
    return False


def random_states(step: Callable) -> list[str]:
    """How far the CPU's random number generators are: the global ones of Python, NumPy and torch,
    and those that the step reads from its module."""
    states = [random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state().tolist()]
    for _, value in read_by(step):
        if isinstance(value, np.random.Generator):
            states.append(value.bit_generator.state)
        if isinstance(value, random.Random):
            states.append(value.getstate())
        if isinstance(value, torch.Generator):
            states.append(value.get_state().tolist())
    return [repr(state) for state in states]
