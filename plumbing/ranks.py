"""Several processes that train one run, each on a GPU of its own, by torch.distributed.

    torchrun --nproc-per-node 2 train.py --unfreeze layer4

Rank r of N holds the images i with i % N == r, and their features: the cache grows with the ranks.
Gradients are averaged by DistributedDataParallel, an image counting the same in each batch. Where
there is one process, every function here gives back what it was given.
"""

import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data import Images, UserError
from plumbing.machine import pick_device


def several() -> bool:
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    return dist.get_world_size() if several() else 1


def rank() -> int:
    return dist.get_rank() if several() else 0


def join(name: str) -> torch.device:
    """Join the processes that torchrun has started, if it has: rank 0 alone prints from now on.
    name: what --device says. Returns this process's device. Raises UserError."""
    if "LOCAL_RANK" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return pick_device(name)
    if name not in ("auto", "cuda", "cpu"):
        raise UserError(f"--device {name} is for one process: torchrun gives each its own GPU")
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if name != "cpu" and gpus:
        if local >= gpus:
            raise UserError(f"--nproc-per-node asks for more processes than there are GPUs, {gpus}")
        torch.cuda.set_device(local)
    device = pick_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", local)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    return device


def leave() -> None:
    """At the end of a run that went well: after an error NCCL would wait here for the others."""
    if several():
        dist.destroy_process_group()


def told(value: object) -> object:
    """What rank 0 has, on all ranks."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def mine(values: torch.Tensor) -> torch.Tensor:
    """Of something that all images have, [images, ...], what this rank's have."""
    return values[rank() :: count()]


def my_order(order: torch.Tensor, flips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of an epoch's order, int64 [images], and its flips, bool [images], this rank's, with its
    images counted from 0."""
    return order[order % count() == rank()] // count(), mine(flips)


def sizes(images: int, batch_size: int) -> int | list[int]:
    """How many images this rank's batches have; of all ranks together there are `images`. Every
    rank has as many batches: one image more than the others have is in the last one."""
    if count() == 1:
        return batch_size
    own = len(range(rank(), images, count()))
    last = smallest(images, batch_size) + own - images // count()
    return [batch_size] * ((own - last) // batch_size) + [last]


def smallest(images: int, batch_size: int) -> int:
    """How many images the smallest batch of any rank has."""
    fewest = images // count()  # of a rank
    return fewest - batch_size * (-(-fewest // batch_size) - 1)


def summed(*values: float) -> list[float]:
    """Numbers, each summed over the ranks."""
    box = torch.tensor(values, dtype=torch.float64, device=sends_from())
    dist.all_reduce(box)
    return box.tolist()


def sends_from() -> str:
    """Where NCCL and gloo want numbers that are to be sent."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def agreed(values: tuple[float, ...], images: int, model: nn.Module) -> tuple[float, ...]:
    """After an epoch: means over this rank's images become means over all ranks' images, and every
    BatchNorm that is in train mode takes the mean of the ranks' running statistics."""
    if count() == 1:
        return values
    for module in model.modules():
        if module.training and getattr(module, "running_mean", None) is not None:
            for running in (module.running_mean, module.running_var):
                dist.all_reduce(running)
                running /= count()
    *sums, total = summed(*(value * images for value in values), images)
    return tuple(one / total for one in sums)


def shard(images: Images) -> Images:
    """All labels, and this rank's pixels."""
    if count() == 1:
        return images
    return images._replace(pixels=mine(images.pixels).clone())


class Together(nn.Module):
    """A tail whose gradients are those of all ranks' batches as one, through
    DistributedDataParallel, which takes the mean of the ranks' gradients: a rank's counts by the
    images of its batch. BatchNorm sees its own rank's batch."""

    def __init__(self, tail: nn.Module):
        super().__init__()
        self.tail = tail
        warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # renamed in torch 2.14
        self.synchronized = DistributedDataParallel(tail, broadcast_buffers=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self.tail(x)
        logits = self.synchronized(x)
        images = torch.tensor(len(x), dtype=torch.float64, device=x.device)
        dist.all_reduce(images)
        weight = len(x) * count() / images
        logits.register_hook(lambda gradient: gradient * weight.to(gradient.dtype))
        return logits


def together(tail: nn.Module) -> nn.Module:
    return tail if count() == 1 else Together(tail)


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """This rank's rows, [its images, ...], with those of the others in the order of all images."""
    if count() == 1:
        return rows
    (total,) = map(int, summed(len(rows)))
    padded = rows.new_zeros((-(-total // count()), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(count())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]
