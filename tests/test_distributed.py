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


@pytest.fixture
def two(monkeypatch):
    """two(rank): be that one of two ranks."""

    def be(rank: int) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)

    return be


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


def setup() -> tuple[torch.Tensor, torch.Tensor, nn.Module, torch.optim.Optimizer]:
    """13 images, their labels, and a network to learn them with."""
    torch.manual_seed(0)
    x, y = torch.randn(13, 36, dtype=torch.float64), torch.randint(3, (13,))
    tail = nn.Linear(36, 3).double()
    return x, y, tail, torch.optim.Adam(tail.parameters(), lr=0.01)


def learn(rank: int, port: int, folder: Path) -> None:
    """What train.py does in a process that torchrun has started."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    environment |= {"RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
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
        means = distributed.all_reduce_mean({"loss": total / len(order)}, len(order))
        losses.append(means["loss"])
    with torch.no_grad():
        logits = distributed.all_gather(tail(distributed.local_rows(x)), 13)
    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(rank)
    norm.running_var.fill_(3 * rank)
    distributed.average_batchnorm(norm)
    averages = norm.running_mean.item(), norm.running_var.item()
    torch.save((tail.state_dict(), losses, logits, averages), folder / f"{rank}.pt")
    distributed.destroy()


def test_two_ranks_learn_what_one_process_learns_from_both_batches(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [CONTEXT.Process(target=learn, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    (x, y, tail, optimizer), losses = setup(), []
    for _ in range(2):
        order, total = torch.randperm(13), 0
        even, odd = order[order % 2 == 0], order[order % 2 == 1]
        for some in map(torch.cat, zip(even.split([3, 4]), odd.split([3, 3]))):
            loss = F.cross_entropy(tail(x[some]), y[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(some)
        losses.append(total / 13)
    for rank, process in enumerate(ranks):
        process.join()
        assert process.exitcode == 0
        state, found, logits, averages = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(state, tail.state_dict(), rtol=0, atol=1e-12)
        assert found == pytest.approx(losses, abs=1e-12) and averages == (0.5, 1.5)
        torch.testing.assert_close(logits, tail(x).detach(), rtol=0, atol=1e-12)


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
        "score = train.score_epoch\n"
        "dies = lambda *given: distributed.rank() and os.kill(os.getpid(), 9) or score(*given)\n"
        "train.score_epoch = dies\n"
        "train.main(sys.argv[1:])\n"
    )
    done = torchrun(str(tmp_path / "dies.py"), *WORDS, "--out", str(tmp_path))
    assert done.returncode != 0 and "Signal 9" in done.stderr
    assert not list(tmp_path.glob("*/epoch*.pt"))
