"""Fine-tune an ImageNet ResNet; what is frozen is computed once.

    python train.py --unfreeze layer4 --epochs 10         # layer4 and fc learn
    python train.py --unfreeze layer3 layer4 --epochs 50  # layer3, layer4, fc
    python train.py --unfreeze layer4 --epochs 10 50      # both, in 50 epochs
    python train.py --epochs 10                           # fc alone
    python train.py --unfreeze layer4 --lr layer4=3e-4 fc=3e-3
    python train.py --unfreeze layer4 --dataset folder --data-dir pictures
    python train.py --dataset synthetic --weights none --image-size 64

The defaults are the published experiment: CIFAR-10 at 224x224, Adam, constant
learning rates. A run leaves history.csv and epochN.pt in a folder of its own
under --out.
"""

import plumbing  # noqa: F401  # before torch, for whose threads it sets something

# isort: split
import functools
import time
from argparse import Namespace
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

import freeze
from data import Images, epoch_order
from features import Features
from plumbing import cache, datasets, flags, machine, ranks, terminal, weights
from plumbing.command import command
from plumbing.convolution import faster
from plumbing.graph import Replayed, capturable
from plumbing.runs import Run
from plumbing.scoring import predict, score
from plumbing.settings import settings_of

# The recipe: what the published experiment is. A flag changes a line of it for one run.
RECIPE = {
    "model": "resnet18",
    "weights": "imagenet",  # torchvision's IMAGENET1K_V1
    "dataset": "cifar10",  # mirrored at random in training, and nothing else
    "image_size": 224,
    "rates": freeze.LEARNING_RATES,  # fc 1e-3, layer4 1e-4, layer3 1e-5, constant
    "batch_size": 128,  # the one line that the publication does not state
    "epochs": [10],
}
OPTIMIZER = functools.partial(torch.optim.Adam, fused=True)  # or (torch.optim.SGD, momentum=0.9)
LOSS = F.cross_entropy


def train_step(
    x: torch.Tensor,
    y: torch.Tensor,
    tail: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: torch.autocast,
) -> torch.Tensor:
    """Forward, backward, update. x: features of a batch; y: int64 [B]. Returns the sum of the
    losses and how many were right, [2], on the device: no step waits for a number."""
    with autocast:
        logits = tail(x)
    loss = LOSS(logits.float(), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    right = (logits.detach().argmax(1) == y).sum()
    return torch.stack([loss.detach() * len(y), right])


def train_epoch(
    step: Callable[..., torch.Tensor],
    batches: Iterable[torch.Tensor],
    targets: tuple[torch.Tensor, ...],
    report: Callable[[int, int], None],
) -> tuple[float, float]:
    """One pass over all batches. Returns the mean loss in nats and the accuracy in [0, 1], as the
    network was at each step."""
    total = 0
    for number, (x, y) in enumerate(zip(batches, targets), start=1):
        total = total + step(x, y)
        report(number, len(targets))
    loss, right = total.tolist()
    count = sum(len(y) for y in targets)
    return loss / count, right / count


def main(argv: list[str] | None = None) -> None:
    # What is asked for, and on which machine.
    args = flags.parse(__doc__, RECIPE, argv)
    device = ranks.join(args.device)  # one process, or torchrun's
    args.precision = machine.pick_precision(args.precision, device)
    machine.tune(device)

    # The pictures, and the pretrained network with a new last layer.
    train, test = datasets.load_both(args)
    state = weights.load(args.weights, args.model)
    model = freeze.build(args.model, len(train.classes), state, args.seed).to(device)
    faster(model)  # its convolutions, on a CPU

    # The run's folder, which knows how far the run has come.
    with Run(args, settings_of(args, train, test, model)) as run:
        train, test = ranks.shard(train), ranks.shard(test)
        if run.missing:
            fine_tune(run, model, train, test, args, device)
        else:
            print(f"{run.folder}: finished")


def fine_tune(
    run: Run, model: nn.Module, train: Images, test: Images, args: Namespace, device: torch.device
) -> None:
    """Train what is still missing of a run."""
    # Freeze, and compute once what the frozen part makes of every picture.
    tail, inputs, test_inputs = freeze_and_split(model, train, test, args, device)
    terminal.print_setup(run.folder, model, train, test, args, device)
    where = args.cache, device, args.out / "features", args.batch_size
    inputs, test_inputs, run.fill_seconds = cache.keep([inputs, test_inputs], *where)
    labels, test_labels = ranks.mine(train.labels).to(device), test.labels.to(device)
    sizes = ranks.sizes(len(train.labels), args.batch_size)
    drift = freeze.Drift(model, args.unfreeze[:-1])  # away from the pretrained weights

    # Adam, and a step of it. What a stopped run had reached is put back.
    optimizer = OPTIMIZER(freeze.param_groups(model, args.rates))
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    autocast = machine.autocast(device, args.precision)
    learns = {"tail": tail, "optimizer": optimizer, "scaler": scaler, "autocast": autocast}
    step = functools.partial(train_step, **learns)
    run.restore(model, optimizer, scaler)
    if device.type == "cuda" and ranks.count() == 1:  # hundreds of launches, replayed as one
        capturable(optimizer)
        step = Replayed(step)

    # Train, test, keep. The order and the flips of an epoch come from the seed and its number.
    for epoch in run.epochs():
        start = time.monotonic()
        set_mode(model, args)
        order, flips = ranks.my_order(*epoch_order(len(train.labels), args.seed, epoch))
        batches = inputs.batches(sizes, order, flips)
        targets = labels[order.to(device)].split(sizes)
        trained = train_epoch(step, batches, targets, terminal.reporter(f"epoch {epoch}, step"))
        trained = ranks.agreed(trained, len(inputs), model)
        between = time.monotonic()
        batches = terminal.watched(test_inputs.batches(128), f"epoch {epoch}: testing")
        logits = ranks.gathered(predict(tail, batches, device, args.precision))
        tested = score(logits, test_labels)
        times = time.monotonic() - start, between - start
        run.keep(epoch, trained, tested, times, drift.now(), logits.argmax(1) == test_labels)


def freeze_and_split(
    model: nn.Module, train: Images, test: Images, args: Namespace, device: torch.device
) -> tuple[nn.Module, Features, Features]:
    """The part that learns, and its inputs for training and test, not computed yet."""
    freeze.freeze(model, args.unfreeze)
    first = args.unfreeze[0]
    if args.frozen_batchnorm == "train":
        first = "stem"  # BatchNorm that sees the batch gives nothing that stays the same
    prefix, tail = freeze.split(model, first)
    where = args.image_size, device, machine.PRECISIONS[args.precision]
    inputs = Features(prefix, train.pixels, *where, mirrored=True)
    test_inputs = Features(prefix, test.pixels, *where, mirrored=False)
    return ranks.together(tail), inputs, test_inputs


def set_mode(model: nn.Module, args: Namespace) -> None:
    """Train mode for what learns, and eval mode for what is frozen; or the usual mistake."""
    if args.frozen_batchnorm == "train":
        model.train()
    else:
        freeze.train_mode(model)


if __name__ == "__main__":
    command(
        main,
        when_stopped="to go on after the last epoch kept, run the same command with --resume",
        when_full="lower --batch-size or --image-size, or try --cache host or off",
    )
