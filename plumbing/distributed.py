"""Several processes that train one run, each on a GPU of its own, by torch.distributed.

    torchrun --nproc-per-node 2 train.py --unfreeze layer4

Rank r of N holds the images i with i % N == r, and their features: the cache grows with the ranks.
An image counts the same in every batch. With one process the functions return what they are given.
"""

import os
import sys
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data import Images, UserError
from plumbing.machine import pick_device


class Splits(NamedTuple):
    """A data set. Each process has the pixels of its own images, and all labels of test and val."""

    train: Images
    test: Images
    train_images: int  # of all processes
    picture_size: tuple[int, int]  # (height, width) of all pictures in memory
    hashes: dict[str, str]  # train, val and test: sha256 of all pixels and labels
    val: Images | None = None  # to choose epoch and strategy on; without it, test is what there is

    def watched(self) -> dict[str, Images]:
        """What is scored after every epoch, by name."""
        return {"val": self.val, "test": self.test} if self.val else {"test": self.test}


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def init(name: str) -> torch.device:
    """Join the processes that torchrun has started, if it has; rank 0 alone prints from now on.
    name: what --device says. Returns this process's device. Raises UserError."""
    if "LOCAL_RANK" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return pick_device(name)
    if name not in ("auto", "cuda", "cpu"):
        raise UserError(f"--device {name} is for one process: torchrun gives each its own GPU")
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if name != "cpu" and gpus:
        if local >= gpus:
            raise UserError(f"--nproc-per-node asks for more processes than there are GPUs, {gpus}")
        torch.cuda.set_device(local)  # on which pick_device tries to compute
    device, backend = pick_device(name), "gloo"
    if device.type == "cuda":
        device, backend = torch.device("cuda", local), "nccl"
    dist.init_process_group(backend)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    return device


def destroy() -> None:
    """At the end of a run that went well: after an error NCCL would wait here for the others. The
    barrier is there because a rank that the others leave early is sometimes aborted."""
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def local_rows(values: torch.Tensor) -> torch.Tensor:
    """Of something that all images have, [images, ...], the rows of this rank's images."""
    if world_size() == 1:
        return values
    return values[rank() :: world_size()].clone()


def local_epoch(
    order: torch.Tensor, flips: torch.Tensor, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """This rank's part of an epoch's order, int64 [images], and flips, bool [images], with its
    images counted from 0; and the sizes of its batches."""
    own = order[order % world_size() == rank()] // world_size()
    # Every rank has as many batches. A rank with one image more has it in its last batch.
    last = smallest_batch(len(order), batch_size) + len(own) - len(order) // world_size()
    sizes = [batch_size] * ((len(own) - last) // batch_size) + [last]
    return own, local_rows(flips), sizes


def smallest_batch(images: int, batch_size: int) -> int:
    """How many images the smallest batch of any rank has."""
    fewest = images // world_size()  # of a rank
    return (fewest - 1) % batch_size + 1


def broadcast(value: object) -> object:
    """What rank 0 has, on all ranks."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def all_reduce_mean(values: dict[str, float], images: int) -> dict[str, float]:
    """Means over this rank's images become means over all ranks' images."""
    if world_size() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor([*values.values(), 1], dtype=torch.float64, device=device) * images
    dist.all_reduce(sums)
    *means, _ = (sums / sums[-1]).tolist()
    return dict(zip(values, means))


def all_gather(rows: torch.Tensor, total: int) -> torch.Tensor:
    """The rows, [images, ...], of all ranks in the order of all `total` images."""
    if world_size() == 1:
        return rows
    padded = rows.new_zeros((-(-total // world_size()), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def average_batchnorm(model: nn.Module) -> None:
    """Before a test: every BatchNorm in train mode takes the ranks' mean running statistics."""
    if world_size() == 1:
        return
    for module in model.modules():
        if module.training and getattr(module, "running_mean", None) is not None:
            for running in (module.running_mean, module.running_var):
                dist.all_reduce(running)
                running /= world_size()


def ddp(tail: nn.Module) -> nn.Module:
    """A tail that learns from all ranks' batches as from one; BatchNorm sees its own rank's."""
    if world_size() == 1:
        return tail
    warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # renamed in torch 2.14
    tail = DistributedDataParallel(tail, broadcast_buffers=False)

    def weigh_gradient(_, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> None:
        """Weighs a rank's gradient by the images of its batch, for DDP takes the ranks' mean."""
        if logits.requires_grad:
            images = torch.tensor(len(logits), dtype=torch.float64, device=logits.device)
            dist.all_reduce(images)
            weight = len(logits) * world_size() / images
            logits.register_hook(lambda gradient: gradient * weight.to(gradient.dtype))

    tail.register_forward_hook(weigh_gradient)
    return tail
