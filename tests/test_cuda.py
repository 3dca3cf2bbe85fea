"""What only a CUDA device can show: pytest -m cuda. Skipped where there is none."""

import functools

import pytest
import torch
from conftest import checkpoint, history, rows
from torch import nn
from torch.optim import lr_scheduler

import data
import evaluate
import features
import freeze
import train
from plumbing import cache, machine
from plumbing.graph import CudaGraphStep

pytestmark = pytest.mark.cuda
LOSSES = ("train_loss", "test_loss")
CUDA = ("--device", "cuda", "--unfreeze", "layer4")


@pytest.mark.parametrize("size, wrong", [(32, 0), (28, 1e-3), (56, 1e-3), (112, 1e-3)])
def test_the_transform_is_the_cpu_s(size, wrong):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (8, size, size, 3), dtype=torch.uint8, generator=generator)
    flips = torch.arange(8) % 2 == 0
    on_device = data.transform(pixels.cuda(), 224, flips=flips.cuda()).cpu()
    difference = (on_device - data.transform(pixels, 224, flips=flips)).abs()
    assert (difference > 1e-4).float().mean() <= wrong


@pytest.mark.parametrize("unfreeze", [["layer4"], []])
def test_every_place_of_the_cache_gives_the_same_losses(run, unfreeze):
    flags = ["--device", "cuda", "--unfreeze", *unfreeze, "--cache"]
    expected = history(run(*flags, "device"), *LOSSES)
    for place in ("host", "off"):
        found = history(run(*flags, place), *LOSSES)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_a_cache_split_over_places_gives_the_same_losses(run, monkeypatch, capsys):
    """features.SMALL_BYTES: pixels stay on the host, as those of many pictures do."""
    expected = history(run(*CUDA), *LOSSES)
    monkeypatch.setattr(features, "SMALL_BYTES", 0)
    for device, host in [(2**20, 2**18), (2**20, 0), (0, 2**20)]:
        free = {"device": cache.FREE_BYTES + device, "host": cache.FREE_BYTES + host}
        monkeypatch.setattr(cache, "free_memory", lambda place, *_, free=free: free[place])
        found = history(run(*CUDA), *LOSSES)
        assert "they do not fit" in capsys.readouterr().out
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_device_learns_what_the_cpu_learns_and_evaluation_agrees(run, precision, tmp_path):
    flags = ["--unfreeze", "layer4", "--precision", precision]
    cpu, cuda = run("--device", "cpu", *flags), run("--device", "cuda", *flags)
    expected, found = history(cpu, *LOSSES), history(cuda, *LOSSES)
    torch.testing.assert_close(expected, found, rtol=5e-2, atol=0)
    evaluate.main([str(cuda / "epoch2.pt"), "--csv", str(tmp_path / "summary.csv")])
    (scored,) = rows(tmp_path / "summary.csv")
    logged = history(cuda, "test_accuracy")[-1][0]
    assert abs(float(scored["test_accuracy"]) - logged) * 60 < 1.5
    assert scored["device"] == torch.cuda.get_device_name()
    assert checkpoint(cuda)["metadata"]["device_type"] == "cuda"


SCHEDULES = {
    "constant": None,
    "epochs": lambda optimizer, epochs: lr_scheduler.CosineAnnealingLR(optimizer, epochs),
    "steps": lambda optimizer, steps: lr_scheduler.LinearLR(optimizer, 0.1, 1.0, steps),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_replayed_run_is_the_ordinary_run(run, monkeypatch, schedule, precision):
    """CUDA graphs change the launching, not the sums: 60 images in batches of 25 have an odd
    last batch."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # it takes other algorithms
    monkeypatch.setattr(machine, "tune", lambda device: None)
    monkeypatch.setattr(train, "SCHEDULE", SCHEDULES[schedule])
    flags = [*CUDA, "--precision", precision, "--epochs", "5"]
    replayed = run(*flags)
    monkeypatch.setattr(train, "RECORD", False)
    ordinary = run(*flags)
    columns, tolerance = ("fc_lr", "layer4_lr"), 1e-1
    if (schedule, precision) == ("constant", "fp32"):
        tolerance = 1e-2
    assert history(replayed, *columns) == history(ordinary, *columns)
    expected = history(ordinary, *LOSSES)
    torch.testing.assert_close(history(replayed, *LOSSES), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("first, second", [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_on_its_device_and_on_another(run, tmp_path, first, second):
    tolerance = 1e-2 if first == second else 5e-2
    flags = ["--unfreeze", "layer4", "--precision", "fp32"]
    out = ["--out", str(tmp_path / "out")]
    run(*flags, *out, "--device", first, "--epochs", "2")
    folder = run(*flags, *out, "--device", second, "--epochs", "2", "4", "--resume")
    assert {file.name for file in folder.iterdir()} == {"history.csv", "epoch2.pt", "epoch4.pt"}
    expected = history(run(*flags, "--device", second, "--epochs", "4"), *LOSSES)
    torch.testing.assert_close(history(folder, *LOSSES), expected, rtol=tolerance, atol=0)


# ---------------------------------------------------------------- a recorded step


class Learner:
    """A small tail with an optimizer, and a step of train.py's."""

    def __init__(self, optimizer, precision: str, record: bool):
        torch.manual_seed(0)
        layers = [nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), freeze.Average()]
        self.tail = nn.Sequential(*layers, nn.Linear(16, 5)).cuda()
        groups = [
            {"name": "fc", "params": list(self.tail[4].parameters()), "lr": 1e-2},
            {"name": "layer4", "params": list(self.tail[:2].parameters()), "lr": 1e-3},
        ]
        self.optimizer, self.said = optimizer(groups), []
        self.scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
        autocast = machine.autocast(torch.device("cuda"), precision)
        parts = {"tail": self.tail, "optimizer": self.optimizer, "scaler": self.scaler}
        self.step = functools.partial(train.train_step, **parts, autocast=autocast)
        if record:
            self.step = CudaGraphStep(self.step, self.tail, self.optimizer, self.said.append)

    def __call__(self, number: int, rows: int = 32) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(number)
        x = torch.randn(rows, 8, 6, 6, device="cuda", generator=generator)
        y = torch.randint(5, (rows,), device="cuda", generator=generator)
        return self.step(x, y).clone()

    def warm_up(self) -> list[torch.Tensor]:
        """The parameters after steps enough for a graph."""
        for number in range(8):
            self(number)
        return [parameter.detach().clone() for parameter in self.tail.parameters()]


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "fused Adam": functools.partial(torch.optim.Adam, fused=True),
    "fused AdamW": functools.partial(torch.optim.AdamW, weight_decay=0.1, fused=True),
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
    "fused SGD": functools.partial(torch.optim.SGD, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_recorded_step_is_an_ordinary_one_step_by_step(optimizer, precision, monkeypatch):
    """With odd batches, a test between, a changed rate, and a stage that is frozen later."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # it takes other algorithms
    both = [Learner(OPTIMIZERS[optimizer], precision, record) for record in (True, False)]
    for number in range(30):
        for learner in both:
            if number == 12:
                for group in learner.optimizer.param_groups:
                    group["lr"] *= 0.1
            if number == 20:
                learner.tail[0].requires_grad_(False)
            if number % 10 == 9:
                learner.tail.eval()
                with torch.no_grad():
                    learner.tail(torch.ones(2, 8, 6, 6, device="cuda"))
                learner.tail.train()
        losses = [learner(number, 20 if number % 7 == 6 else 32)[0] for learner in both]
        torch.testing.assert_close(*losses, rtol=2e-2, atol=2e-2)
        states = [learner.tail.state_dict() for learner in both]
        torch.testing.assert_close(*states, rtol=2e-2, atol=2e-3)
    assert (both[0].step.graph is None) == bool(both[0].said)  # who is not recorded says why
    assert torch.ones(1, device="cuda").item() == 1  # the device is as usable as before


def test_an_overflow_in_a_replay_moves_nothing_and_halves_the_scale():
    learner = Learner(OPTIMIZERS["fused Adam"], "fp16", record=True)
    before, scale = learner.warm_up(), learner.scaler.get_scale()
    assert learner.step.graph is not None
    x = torch.full((32, 8, 6, 6), 6e4, device="cuda")
    learner.step(x, torch.zeros(32, dtype=torch.int64, device="cuda"))
    assert learner.scaler.get_scale() == scale / 2
    assert all(map(torch.equal, before, learner.tail.parameters()))


def test_sgd_in_fp16_is_not_recorded_and_that_is_said():
    learner = Learner(OPTIMIZERS["SGD"], "fp16", record=True)
    learner.warm_up()
    assert learner.step.graph is None and "it waits for the device" in learner.said[0]


def test_augmented_pictures_train_on_the_device(run, monkeypatch):
    monkeypatch.setattr(train, "AUGMENT", data.random_crop)
    one, two = (history(run(*CUDA, "--precision", "fp32"), *LOSSES) for _ in range(2))
    torch.testing.assert_close(one, two, rtol=1e-2, atol=0)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 256, 257])
def test_any_number_of_rows_is_computed(count):
    pixels = torch.randint(256, (300, 32, 32, 3), dtype=torch.uint8)
    prefix, _ = freeze.split(freeze.build("resnet18", 10), "layer2")
    here = features.Features(prefix, pixels, 64, "cuda", torch.float32, mirrored=True)
    rows = torch.randperm(600)[:count]
    found = here.compute(rows).cpu()
    there = features.Features(prefix.cpu(), pixels, 64, "cpu", torch.float32, mirrored=True)
    torch.testing.assert_close(found, there.compute(rows), rtol=2e-2, atol=2e-2)


def test_a_device_that_is_full_after_all_leaves_the_features_to_the_host(run, monkeypatch, capsys):
    flags = [*CUDA, "--image-size", "224", "--epochs", "1"]
    expected = history(run(*flags), *LOSSES)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    fill = features.Features.fill

    def starved(self, device, *more):
        if torch.device(device).type == "cuda":
            torch.empty(total, dtype=torch.uint8, device="cuda")  # more than the fraction below
        return fill(self, device, *more)

    monkeypatch.setattr(features.Features, "fill", starved)
    torch.cuda.set_per_process_memory_fraction(0.5)
    try:
        found = history(run(*flags), *LOSSES)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "it does not fit in device memory after all" in capsys.readouterr().out
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
