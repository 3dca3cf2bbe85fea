"""One run on several processes, with gloo on the CPU: what two ranks learn, and what they keep."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CONTEXT, ROOT, SMALL, checkpoint, history
from torch import nn

import train
from data import UserError
from plumbing import distributed

COLUMNS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


# ---------------------------------------------------------------- who has which images


@pytest.fixture
def two(monkeypatch):
    """two(rank): be that one of two ranks."""

    def be(rank: int) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)

    return be


def test_one_process_is_left_as_it_is():
    order, flips = torch.randperm(7), torch.rand(7) < 0.5
    same = distributed.local_epoch(order, flips, 3)
    assert same[0] is order and same[1] is flips and same[2] == 3
    tail, values = nn.Linear(2, 2), {"train_loss": 0.5}
    assert distributed.local_rows(order) is order and distributed.ddp(tail) is tail
    assert distributed.all_reduce_mean(values, 3) is values
    assert distributed.all_gather(order, 7) is order and distributed.broadcast(values) is values
    assert distributed.init("cpu") == torch.device("cpu")


@pytest.mark.parametrize("images", [2, 5, 12, 13, 24, 25, 27])
def test_the_ranks_share_all_images_in_as_many_batches(two, images):
    order, flips = torch.randperm(images), torch.rand(images) < 0.5
    pixels, found, batches = torch.arange(images), [], []
    for rank in (0, 1):
        two(rank)
        own, own_flips, sizes = distributed.local_epoch(order, flips, 6)
        batches.append(sizes)
        assert sum(sizes) == len(own) == len(own_flips) and min(sizes) > 0 and max(sizes) <= 7
        mine = distributed.local_rows(pixels)[own]
        assert torch.equal(own_flips[own], flips[mine])
        place = {image: number for number, image in enumerate(order.tolist())}
        assert [place[image] for image in mine.tolist()] == sorted(map(place.get, mine.tolist()))
        found += mine.tolist()
    assert sorted(found) == list(range(images)) and len(batches[0]) == len(batches[1])
    assert distributed.smallest_batch(images, 6) == min(batches[0] + batches[1])


@pytest.mark.parametrize(
    "device, expected",
    [
        ("mps", "--device mps is for one process"),
        ("cuda:1", "--device cuda:1 is for one process"),
        ("auto", "--nproc-per-node asks for more processes than there are GPUs, 2"),
    ],
)
def test_a_device_that_not_all_ranks_can_have_is_refused(monkeypatch, device, expected):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=expected):
        distributed.init(device)


def test_fewer_images_than_ranks_are_refused(monkeypatch, run):
    monkeypatch.setattr(distributed, "world_size", lambda: 61)
    with pytest.raises(UserError, match="60 images are too few for 61 processes"):
        run()


# ---------------------------------------------------------------- what they compute


def setup() -> tuple[torch.Tensor, torch.Tensor, nn.Module, torch.optim.Optimizer]:
    """13 images, their labels, and a network to learn them with."""
    torch.manual_seed(0)
    x, y = torch.randn(13, 4, 3, 3, dtype=torch.float64), torch.randint(3, (13,))
    tail = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3)).double()
    return x, y, tail, torch.optim.Adam(tail.parameters(), lr=0.01)


def learn(rank: int, port: int, folder: Path) -> None:
    """What train.py does in a process that torchrun has started."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    environment |= {"RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in environment.items()})
    distributed.init("cpu")
    x, y, tail, optimizer = setup()
    wrapped, losses = distributed.ddp(tail), []
    for _ in range(2):
        flips = torch.zeros(13, dtype=torch.bool)
        order, _, sizes = distributed.local_epoch(torch.randperm(13), flips, 3)
        total = 0
        for some in order.split(sizes):
            here, labels = distributed.local_rows(x)[some], distributed.local_rows(y)[some]
            loss = F.cross_entropy(wrapped(here), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(some)
        distributed.average_batchnorm(tail)
        means = distributed.all_reduce_mean({"loss": total / len(order)}, len(order))
        losses.append(means["loss"])
    with torch.no_grad():
        logits = distributed.all_gather(tail.eval()(distributed.local_rows(x)), 13)
    torch.save((tail.state_dict(), losses, logits), folder / f"{rank}.pt")
    distributed.destroy()


def in_one_process() -> tuple[dict, list[float], torch.Tensor]:
    """What the two ranks above should do, by the textbook: the gradient of the mean loss over the
    images of both batches, each normalized by itself."""
    (x, y, tail, optimizer), losses = setup(), []
    buffers = {name: value.clone() for name, value in tail.named_buffers()}
    for _ in range(2):
        order = torch.randperm(13)
        halves = [order[order % 2 == rank] for rank in (0, 1)]
        running = [{name: value.clone() for name, value in buffers.items()} for _ in halves]
        total = 0
        for both in zip(halves[0].split([3, 4]), halves[1].split([3, 3])):
            summed = 0
            for rank, some in enumerate(both):
                logits = torch.func.functional_call(tail, running[rank], x[some])
                summed = summed + F.cross_entropy(logits, y[some], reduction="sum")
            optimizer.zero_grad()
            (summed / sum(map(len, both))).backward()
            optimizer.step()
            total += summed.item()
        losses.append(total / 13)
        for name in buffers:
            average = (running[0][name] + running[1][name]) / 2
            buffers[name] = average.to(buffers[name].dtype)
    with torch.no_grad():
        state = dict(tail.named_parameters()) | buffers
        logits = torch.func.functional_call(tail.eval(), buffers, x)
    return state, losses, logits


def test_two_ranks_learn_what_one_process_learns_from_both_batches(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [CONTEXT.Process(target=learn, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    expected, losses, logits = in_one_process()
    for rank in (0, 1):
        state, found, gathered = torch.load(tmp_path / f"{rank}.pt")
        assert state.keys() == expected.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)
        assert found == pytest.approx(losses, abs=1e-12)
        torch.testing.assert_close(gathered, logits, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- a run


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WORDS = [*SMALL, "--image-size", "32", "--train-size", "61", "--batch-size", "10"]
WORDS += ["--unfreeze", "layer4"]


def torchrun(*words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    how = {"capture_output": True, "text": True, "env": environment, "timeout": 300}
    return subprocess.run([*TWO, *words], **how)


@pytest.mark.slow
def test_a_run_on_two_ranks_is_told_once_kept_once_and_goes_on(tmp_path):
    script, out = str(ROOT / "train.py"), str(tmp_path / "parts")
    whole = torchrun(script, *WORDS, "--epochs", "3", "--out", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("61 train and") == 1 and whole.stdout.count("saved") == 1
    torchrun(script, *WORDS, "--epochs", "1", "--out", out)
    torchrun(script, *WORDS, "--epochs", "1", "3", "--out", out, "--resume")
    (folder,), (parts,) = (tmp_path / "whole").glob("s*"), (tmp_path / "parts").glob("s*")
    left = {file.name for file in parts.iterdir()}
    assert "-r2" in folder.name and left == {"history.csv", "epoch1.pt", "epoch3.pt"}
    assert history(folder, *COLUMNS) == history(parts, *COLUMNS)
    one, other = checkpoint(folder, 3), checkpoint(parts, 3)
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name])
    assert len(one["test_correct"]) == 500 and one["settings"]["ranks"] == 2
    pretrained = train.freeze.build("resnet18", 10, None, 0).state_dict()
    for name, value in one["model"].items():
        if name.startswith(("conv1", "bn1", "layer1", "layer2", "layer3")):
            assert torch.equal(value, pretrained[name])


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others(tmp_path):
    (tmp_path / "dies.py").write_text(
        "import os, sys, train\n"
        "from plumbing import distributed\n"
        "from plumbing.cli import command\n"
        "mean = distributed.all_reduce_mean\n"
        "def dies(*given):\n"
        "    if distributed.rank() == 1:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return mean(*given)\n"
        "distributed.all_reduce_mean = dies\n"
        "command(lambda: train.main(sys.argv[1:]), '', '')\n"
    )
    done = torchrun(str(tmp_path / "dies.py"), *WORDS, "--out", str(tmp_path))
    assert done.returncode != 0 and "Signal 9" in done.stderr
    assert not list(tmp_path.glob("*/epoch*.pt"))
