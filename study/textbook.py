"""The usual script: what a tutorial teaches, and with tuned=True what a good engineer adds.

Pictures are decoded and transformed one by one in a DataLoader's workers, and the whole network
computes in every step. It freezes right (mistake=False), which the usual script does not.
Order and flips of an epoch come from outside, so that it can be compared number for number.
"""

import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


class Pictures(datasets.ImageFolder):
    """Index i is picture i, and index i + len is its mirror image."""

    def __init__(self, root: Path, image_size: int):
        resize = transforms.Resize((image_size, image_size))
        normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        super().__init__(str(root), transforms.Compose([resize, transforms.ToTensor(), normalize]))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = super().__getitem__(index % len(self))
        return image.flip(2) if index >= len(self) else image, label


def train(
    model: torch.nn.Module,
    rates: dict[str, float],
    root: Path,
    epochs: list[tuple[torch.Tensor, torch.Tensor]],
    image_size: int = 224,
    batch_size: int = 128,
    amp: torch.dtype | None = None,
    tuned: bool = False,
    mistake: bool = False,
    workers: int = os.cpu_count(),
) -> list[dict]:
    """Fine-tune on root/train, test on root/test: a row of losses, accuracies and seconds per
    epoch. model: a torchvision ResNet on its device; rates: by layer, those that learn; epochs:
    (order, flips) of each, int64 and bool [N]; amp: autocast's dtype, or None."""
    device, options = next(model.parameters()).device, {"num_workers": workers}
    model.to(memory_format=torch.contiguous_format)
    if tuned:
        options |= {"pin_memory": device.type == "cuda", "persistent_workers": workers > 0}
        model.to(memory_format=torch.channels_last)
    order = []  # filled anew in every epoch
    train_set, test_set = (Pictures(root / split, image_size) for split in ("train", "test"))
    train_loader = DataLoader(train_set, batch_size, sampler=order, **options)
    test_loader = DataLoader(test_set, batch_size, **options)
    optimizer = torch.optim.Adam(what_learns(model, rates), fused=tuned)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    results = []
    for indices, flips in epochs:
        start = time.monotonic()
        order[:] = (indices + len(train_set) * flips[indices]).tolist()
        model.train(mistake)  # the usual script: model.train(), and nothing more
        for name in rates:
            getattr(model, name).train()
        row = one_pass("train", model, train_loader, autocast, tuned, optimizer, scaler)
        row["train_seconds"] = time.monotonic() - start
        with torch.no_grad():
            row |= one_pass("test", model.eval(), test_loader, autocast, tuned)
        results.append(row | {"seconds": time.monotonic() - start})
    return results


def what_learns(model: torch.nn.Module, rates: dict[str, float]) -> list[dict]:
    """The optimizer's groups: the layers that have a rate. The others are frozen."""
    model.requires_grad_(False)
    layers = {name: getattr(model, name).requires_grad_(True) for name in rates}
    return [{"params": layers[name].parameters(), "lr": rates[name]} for name in rates]


def one_pass(split, model, loader, autocast, tuned, optimizer=None, scaler=None) -> dict:
    """Mean loss and accuracy over a DataLoader, from which the model learns with an optimizer."""
    total = right = 0
    device = next(model.parameters()).device
    for x, y in loader:
        x, y = x.to(device, non_blocking=tuned), y.to(device, non_blocking=tuned)
        with autocast:
            logits = model(x)
            loss = F.cross_entropy(logits, y)
        if optimizer:
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        total += (loss.detach() if tuned else loss.item()) * len(y)  # .item() waits for the GPU
        right += (logits.argmax(1) == y).sum()
    count = len(loader.dataset)
    return {f"{split}_loss": float(total) / count, f"{split}_accuracy": int(right) / count}
