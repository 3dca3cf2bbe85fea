"""Learning rates over time, and an optimizer that goes on where a stopped run was.

schedule = Schedule(SCHEDULE, optimizer, epochs=10, steps=10 * 313)
schedule.after_step()      # in a loop over batches
schedule.after_epoch()
"""

import inspect
from collections.abc import Callable

import torch

from data import UserError

MADE_FOR = ("capturable", "fused", "foreach")  # a device: what a checkpoint must not bring along


class Schedule:
    """make: None for constant rates, or a function that gives a scheduler of
    torch.optim.lr_scheduler, of (optimizer, epochs) to take a step after each epoch, or of
    (optimizer, steps) to take one after each training step."""

    def __init__(
        self, make: Callable | None, optimizer: torch.optim.Optimizer, epochs: int, steps: int
    ):
        self.optimizer, self.scheduler, self.by_step = optimizer, None, False
        if make is not None:
            self.by_step = any("step" in name for name in inspect.signature(make).parameters)
            self.scheduler = make(optimizer, steps if self.by_step else epochs)
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UserError(
                "SCHEDULE: ReduceLROnPlateau takes a metric, which it is not given here"
            )
        self.used = self.rates()

    def rates(self) -> dict[str, float]:
        """By stage, as stage_lr, what the next step learns at."""
        groups = self.optimizer.param_groups
        return {f"{group['name']}_lr": float(group["lr"]) for group in groups}

    def after_step(self) -> None:
        if self.by_step:
            self.used = self.rates()
            self.scheduler.step()

    def after_epoch(self) -> dict[str, float]:
        """The rates of the epoch that has ended, of its last step if they change by the step."""
        if not self.by_step:
            self.used = self.rates()
        if self.scheduler and not self.by_step:
            self.scheduler.step()
        return self.used

    def state_dict(self) -> dict:
        return self.scheduler.state_dict() if self.scheduler else {}

    def load_state_dict(self, state: dict) -> None:
        if self.scheduler:
            self.scheduler.load_state_dict(state)


def lengths_of_runs(epochs: list[int], make: Callable | None) -> list[list[int]]:
    """Which of the lengths asked for one run can leave: with constant rates all, with a schedule,
    which is another one for each length, each its own."""
    return [sorted(set(epochs))] if make is None else [[length] for length in sorted(set(epochs))]


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Puts back an optimizer's state_dict, but what is made for the device that it was on. (A run
    goes on only with the code and the rates that it began with.)"""
    groups = optimizer.state_dict()["param_groups"]
    for today, before in zip(groups, saved["param_groups"]):
        today |= {name: before[name] for name in before if name not in (*MADE_FOR, "params")}
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
