"""Fine-tune an ImageNet ResNet; what is frozen is computed once.

    python train.py --unfreeze layer4 --epochs 10         # layer4 and fc learn
    python train.py --unfreeze layer3 layer4 --epochs 50  # layer3, layer4, fc
    python train.py --unfreeze layer4 --epochs 10 50      # both, in 50 epochs
    python train.py --epochs 10                           # fc alone
    python train.py --unfreeze layer4 --lr layer4=3e-4 fc=3e-3
    python train.py --unfreeze layer4 --dataset folder --data-dir pictures
    python train.py --unfreeze layer4 --tag smooth        # with a recipe that you have changed
    python train.py --dataset synthetic --weights none --image-size 64

The defaults are the published experiment: CIFAR-10 at 224x224, Adam, constant learning rates.
A run leaves history.csv and epochN.pt in a folder of its own under --out.
"""

import plumbing  # isort: skip  # noqa: F401  # before torch, for whose threads it sets something
import functools
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

import data
import freeze
from features import Features
from plumbing import cache, datasets, distributed, flags, machine, report
from plumbing.cli import command, progress
from plumbing.convolution import use_fast_convolutions
from plumbing.graph import CudaGraphStep
from plumbing.report import score_epoch
from plumbing.run import Run
from plumbing.settings import Schedule, Settings, lengths_of_runs, settings_of
from plumbing.weights import pretrained

# The recipe: what the published experiment is, and what people change. A flag changes a line of
# the table for one run. Change anything else here, and give the run a name: --tag NAME.
RECIPE = {
    "model": "resnet18",  # or another of freeze.MODELS: mobilenet_v3_large, convnext_tiny
    "weights": "imagenet",  # torchvision's IMAGENET1K_V1
    "dataset": "cifar10",
    "image_size": 224,
    "rates": freeze.LEARNING_RATES,  # fc 1e-3, layer4 1e-4, layer3 1e-5
    "batch_size": 128,  # the one line that the publication does not state
    "epochs": [10],
}
# Or functools.partial(torch.optim.AdamW, weight_decay=0.01, fused=True). Or, with higher "rates"
# in RECIPE, such as {"fc": 0.03, "layer4": 0.01, "layer3": 0.003},
# functools.partial(torch.optim.SGD, momentum=0.9).
OPTIMIZER = functools.partial(torch.optim.Adam, fused=True)
# Constant, as published. Or a function of (optimizer, epochs), to change after each epoch, or of
# (optimizer, steps), to change after each step; the second one's name decides:
# lambda optimizer, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
SCHEDULE = None
LOSS = F.cross_entropy  # or functools.partial(F.cross_entropy, label_smoothing=0.1)
AUGMENT = None  # the mirror image alone, as published; or data.random_crop, data.random_erase
RECORD = True  # steps as a CUDA graph; False where train_step does what its docstring forbids


def train_step(
    x: torch.Tensor,
    y: torch.Tensor,
    tail: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: torch.autocast,
) -> torch.Tensor:
    """Forward, backward, update. x: features of a batch; y: int64 [B]. Returns the sum of the
    losses and how many were right, [2], on the device: no step waits for a number.

    On a GPU it is recorded once and replayed: what Python does here it does once. Random numbers
    come from torch.rand(..., device=x.device); a number that changes is a tensor that is filled
    anew, or a name of this module. For anything else RECORD = False."""
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
    after_step: Callable[[], None],
) -> dict[str, float]:
    """One pass over all batches. Returns the mean loss in nats and the accuracy in [0, 1], as the
    network was at each step."""
    total = 0
    for x, y in zip(batches, targets):
        total = total + step(x, y)
        after_step()
    loss, right = total.tolist()
    count = sum(len(y) for y in targets)
    return {"train_loss": loss / count, "train_accuracy": right / count}


def main(argv: list[str] | None = None) -> None:
    # What is asked for, and on which machine.
    started = time.monotonic()
    args = flags.parse(__doc__, RECIPE, argv)
    rates = flags.learning_rates(args, RECIPE["rates"])  # of all stages that learn
    device = distributed.init(args.device)  # one process, or torchrun's
    precision = machine.pick_precision(args.precision, device)
    machine.tune(device)
    images = datasets.load_splits(args, len(rates) > 1 or args.frozen_batchnorm == "train")

    # With constant rates ten epochs are the beginning of fifty: one run leaves both.
    for lengths in lengths_of_runs(args.epochs, SCHEDULE):
        model = pretrained(args, images.train.classes).to(device)  # with a new last layer
        use_fast_convolutions(model)  # on a CPU
        # The run's folder, which knows how far the run has come.
        settings = settings_of(args, rates, precision, images, model, lengths, SCHEDULE, __file__)
        with Run(args, settings, lengths, images, started) as run:
            if run.missing:
                fine_tune(run, model, images, device)
            else:
                print(f"{run.folder}: finished")
        started = time.monotonic()


def fine_tune(run: Run, model: nn.Module, images: datasets.Splits, device: torch.device) -> None:
    """Train what is still missing of a run."""
    # Freeze, and compute once what the frozen part makes of every picture.
    settings = run.settings
    tail, inputs = freeze_and_split(model, images, settings, device)
    report.print_setup(run, model, images, device)
    inputs, run.fill_seconds = cache.keep(inputs, run.args.cache, device, run.folder, settings)
    labels = images.train.labels.to(device)

    # The optimizer, and a step of it. What a stopped run had reached is put back.
    optimizer = OPTIMIZER(freeze.param_groups(model, settings.rates))
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    autocast = machine.autocast(device, settings.precision)
    learns = {"tail": tail, "optimizer": optimizer, "scaler": scaler, "autocast": autocast}
    step = functools.partial(train_step, **learns)
    if RECORD and device.type == "cuda" and settings.ranks == 1:
        step = CudaGraphStep(step, tail, optimizer)  # hundreds of launches, replayed as one
    steps = -(-(images.train_images // settings.ranks) // settings.batch_size)
    schedule = Schedule(SCHEDULE, optimizer, run.last_epoch, run.last_epoch * steps)
    run.restore({"model": model, "optimizer": optimizer, "scaler": scaler, "schedule": schedule})

    # Train, test, keep. The order and the flips of an epoch come from the seed and its number.
    for epoch in run.epochs():
        freeze.train_mode(tail)  # not tail.train()
        if settings.frozen_batchnorm == "train":
            tail.train()  # the usual mistake, to see what it costs
        order, flips = data.epoch_order(images.train_images, settings.seed, epoch)
        order, flips, sizes = distributed.local_epoch(order, flips, settings.batch_size)
        generator = data.epoch_generator(settings.seed, epoch, device)
        torch.manual_seed(generator.initial_seed() + 1)  # for Dropout and mixup
        batches = inputs["train"].batches(sizes, order, flips, generator)
        batches = progress(batches, f"epoch {epoch}, step", steps, run.last_epoch - epoch)
        targets = labels[order.to(device)].split(sizes)
        trained = train_epoch(step, batches, targets, schedule.after_step)
        run.trained(tail, trained, len(labels))
        scores, correct = score_epoch(tail, inputs, images.watched(), settings, device)
        run.keep(epoch, scores, correct)


def freeze_and_split(
    model: nn.Module, images: datasets.Splits, settings: Settings, device: torch.device
) -> tuple[nn.Module, dict[str, Features]]:
    """The part that learns, and its inputs for train, test and val, not computed yet."""
    freeze.freeze(model, settings.unfrozen)
    first = settings.unfrozen[0]
    if settings.frozen_batchnorm == "train":
        first = next(iter(freeze.stages(model)))  # BatchNorm that sees the batch is not constant
    prefix, tail = freeze.split(model, first)
    where = settings.image_size, device, machine.PRECISIONS[settings.precision]
    train = Features(prefix, images.train.pixels, *where, mirrored=True, augment=AUGMENT)
    inputs = {"train": train}
    for split, others in images.watched().items():
        inputs[split] = Features(prefix, others.pixels, *where, mirrored=False)
    return distributed.ddp(tail), inputs


if __name__ == "__main__":
    command(
        main,
        when_stopped="to go on after the last epoch kept, run the same command with --resume",
        when_full="lower --batch-size or --image-size, or try --cache host or off",
    )
