"""Fine-tune an ImageNet ResNet18; what is frozen is computed once.

    python train.py --unfreeze layer4 --epochs 10         # layer4 and fc learn
    python train.py --unfreeze layer3 layer4 --epochs 50  # layer3, layer4, fc
    python train.py --unfreeze layer4 --epochs 10 50      # both, in 50 epochs
    python train.py --epochs 10                           # fc alone
    python train.py --unfreeze layer4 --lr layer4=3e-4 fc=3e-3
    python train.py --unfreeze layer4 --dataset folder --data-dir pictures
    python train.py --dataset synthetic --weights none --image-size 64

The defaults are the published experiment: CIFAR-10 at 224x224, Adam, constant
learning rates. A run leaves history.csv and checkpoint.pt in a folder of its
own under --out.
"""

import argparse
import contextlib
import fcntl
import io
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

import data
import freeze
from evaluate import (DEVICES, PRECISIONS, autocast, command, device_name, keep_memory, pick_device, pick_precision,
                      predict, read_checkpoint, score, write_csv)
from features import PLACES, Features, choose_place, fill_all
from replay import Replayed

HISTORY = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "train_seconds", "test_seconds")


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--unfreeze", action="extend", nargs="*", default=[], choices=freeze.STAGES, metavar="STAGE",
        help=f"stages that learn beside fc: {' '.join(freeze.STAGES[:-1])} (default: none)")
    add("--lr", action="extend", type=stage_rate, nargs="+", default=[], metavar="STAGE=RATE",
        help="learning rates other than the default ones: " + " ".join(f"{stage}={rate:g}" for stage, rate in freeze.LEARNING_RATES.items()))
    add("--epochs", type=whole_number(1), nargs="+", default=[10],
        help="default: 10; of several, each leaves the run that it alone would have left")
    add("--batch-size", type=whole_number(1), default=128, help="default: 128")
    add("--image-size", type=whole_number(32, 4096), default=224,
        help="side of the square the network sees (default: 224)")
    add("--dataset", choices=data.DATASETS, default="cifar10", help="default: cifar10")
    add("--data-dir", type=lambda path: Path(path).resolve(), default="data",
        help="where the data set is, or is downloaded to (default: data)")
    add("--weights", default="imagenet", help="imagenet (default), none, or the path of a state_dict")
    add("--train-size", type=whole_number(1), help="train on this many images, the same share of every class")
    add("--seed", type=whole_number(0), default=0, help="of fc's initialization, the subset, the order and the flips")
    add("--device", choices=DEVICES, default="auto", help="auto (default): CUDA, then MPS, then the CPU")
    add("--precision", choices=["auto", *PRECISIONS], default="auto",
        help="auto (default): the lowest that the device is fast at")
    add("--cache", choices=PLACES, default="auto",
        help="where the frozen prefix's outputs are kept; auto (default): where they fit in memory; "
             "disk: in a file under --out, which later runs use too")
    add("--resume", action="store_true",
        help="go on after the run's last finished epoch; leave a finished run as it is")
    add("--out", type=Path, default=Path("results"), help="the runs' folder (default: results)")
    return parser, parser.parse_args(argv)


def whole_number(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    def parse_number(text: str) -> int:
        if not text.isdecimal() or not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"must be a whole number from {minimum} to {maximum}, not {text!r}")
        return int(text)
    return parse_number


def stage_rate(text: str) -> tuple[str, float]:
    stage, _, rate = text.partition("=")
    with contextlib.suppress(ValueError):
        if 0 < float(rate) < math.inf:
            return stage, float(rate)
    raise argparse.ArgumentTypeError(f"{text!r} is not STAGE=RATE with a finite rate above 0, as in fc=0.001")


def run_name(args: argparse.Namespace, unfrozen: list[str], epochs: int) -> str:
    """cifar10-layer3+layer4-e50-s0, and whatever else was not left at its default."""
    dataset = args.data_dir.name if args.dataset == "folder" else args.dataset
    name = f"{dataset}-{'+'.join(unfrozen[:-1]) or 'fc'}-e{epochs}-s{args.seed}"
    name += f"-n{args.train_size}" if args.train_size else ""
    name += f"-b{args.batch_size}" if args.batch_size != 128 else ""
    name += f"-px{args.image_size}" if args.image_size != 224 else ""
    name += f"-{Path(args.weights).stem}" if args.weights != "imagenet" else ""
    name += f"-{args.precision}" if args.precision != "auto" else ""
    return name + "".join(f"-{stage}={rate:g}" for stage, rate in sorted(args.lr))


def plain(args: argparse.Namespace) -> dict:
    """The arguments as values that a checkpoint can hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def resume(directories: dict[int, Path], args: argparse.Namespace) -> tuple[dict | None, dict[int, list]]:
    """The checkpoint to go on from, if there is one, and the history so far of each run.
    Raises ValueError or OSError for one that is damaged or of another run."""
    saved = {}
    for epochs, directory in directories.items():
        file = directory / "checkpoint.pt"
        if file.exists():
            saved[epochs], _ = read_checkpoint(str(file))
            if "optimizer" not in saved[epochs]:
                raise ValueError(f"--resume: {file} is of an older version, without the optimizer's state: delete it")
            before, now = saved[epochs]["arguments"], plain(args)
            for name in now.keys() - {"epochs", "resume", "cache", "out"}:
                if before.get(name) != now[name]:
                    raise ValueError(f"--resume: {file} was trained with --{name.replace('_', '-')} {before.get(name)}, "
                                     f"not {now[name]}: use that, or another --out")
    done = {epochs: saved[epochs]["history"] if epochs in saved else [] for epochs in directories}
    first = min((epochs for epochs in done if len(done[epochs]) < epochs), default=0)
    usable = [checkpoint for checkpoint in saved.values() if len(checkpoint["history"]) <= first]
    return max(usable, key=lambda checkpoint: len(checkpoint["history"]), default=None), done


def lock(directory: Path) -> int:
    """Makes the run's directory and holds it until the process ends or the returned descriptor is closed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for part in directory.glob(".*.part"):  # what a killed run was writing
            part.unlink()
    except BlockingIOError:
        os.close(descriptor)
        raise OSError(f"another run is writing to {directory}: wait for its end, or choose another --out") from None
    except OSError as error:
        raise OSError(f"cannot write to {directory} ({error.strerror}): choose another --out") from error
    return descriptor


def main(argv: list[str] | None = None) -> None:
    with contextlib.ExitStack() as held:
        run(argv, held)


def run(argv: list[str] | None, held: contextlib.ExitStack) -> None:
    began = time.monotonic()
    parser, args = parse(argv)
    unfrozen = [stage for stage in freeze.STAGES if stage in [*args.unfreeze, "fc"]]
    rates = freeze.LEARNING_RATES | dict(args.lr)
    keep_memory()
    try:
        if frozen := {stage for stage, _ in args.lr} - set(unfrozen):
            raise ValueError(f"--lr {frozen.pop()}=...: only what learns has a rate, here {' and '.join(unfrozen)}")
        device = pick_device(args.device)
        precision = pick_precision(args.precision, device)
        directories = {epochs: args.out / run_name(args, unfrozen, epochs) for epochs in sorted(set(args.epochs))}
        checkpoint, done = resume(directories, args) if args.resume else (None, {epochs: [] for epochs in directories})
        for epochs in [epochs for epochs in directories if len(done[epochs]) >= epochs]:
            directory = directories.pop(epochs)
            held.callback(os.close, lock(directory))
            write_csv(directory / "history.csv", done[epochs][0], [row.values() for row in done[epochs]])  # if it was killed before that
            print(f"{directory}: finished")
        if not directories:
            return
        weights = freeze.load_weights(args.weights)
        train = data.load(args.dataset, "train", args.data_dir, args.image_size)
        if args.train_size:
            train = data.stratified_subset(train, args.train_size, args.seed)
        test = data.load(args.dataset, "test", args.data_dir, args.image_size, train.classes)
        if len(train.classes) < 2:
            raise ValueError(f"{args.data_dir} holds one class, {train.classes[0]}: telling classes apart takes two")
        last_batch = len(train.labels) % args.batch_size or args.batch_size
        if last_batch == 1 and args.image_size == 32 and "layer4" in unfrozen:
            raise ValueError(f"--batch-size {args.batch_size} leaves a batch of one of the {len(train.labels)} images, "
                             "from which layer4's BatchNorm cannot learn at --image-size 32: change either")
        model = freeze.build(len(train.classes), weights, args.seed).to(device)
        if checkpoint and (checkpoint["classes"], checkpoint["precision"]) != (list(train.classes), precision):
            raise ValueError(f"--resume: {args.data_dir} has other classes than the run began with, or the precision was "
                             f"{checkpoint['precision']} and is {precision} now: choose another --out")
        started = {name: (stage, freeze.vector(stage)) for name, stage in freeze.stages(model).items() if name in unfrozen[:-1]}
        if checkpoint:  # before the cut, so that what is frozen is the checkpoint's too
            model.load_state_dict(checkpoint["model"])
        freeze.freeze(model, unfrozen)
        prefix, tail = freeze.split(model, unfrozen)
        dtype = PRECISIONS[precision]
        inputs = Features(prefix, train.pixels, args.image_size, device, dtype, mirrored=True)
        test_inputs = Features(prefix, test.pixels, args.image_size, device, dtype, mirrored=False)
        cache = args.out / "features"
        place, reason = choose_place(args.cache, [inputs, test_inputs], device, cache)
        for directory in directories.values():
            held.callback(os.close, lock(directory))
        if args.resume and any(resume({epochs: directories[epochs]}, args)[1][epochs] != done[epochs] for epochs in directories):
            raise OSError("another run went on with these meanwhile: the same command again goes on from there")
    except (OSError, ValueError, MemoryError) as error:
        data.progress()
        parser.error(str(error))

    print(*directories.values(), sep="\n")
    print(f"data     {len(train.labels):,} train and {len(test.labels):,} test images, {len(train.classes)} classes")
    print(f"{'stage':<8} {'parameters':>12}")
    for name, stage in freeze.stages(model).items():
        count = sum(parameter.numel() for parameter in stage.parameters())
        print(f"{name:<8} {count:>12,}  " + (f"learns at {rates[name]:g}" if name in unfrozen else "frozen"))
    no_cuda = ", no CUDA device found" if args.device == "auto" and device.type != "cuda" else ""
    print(f"device   {device_name(device)}, {precision}{no_cuda}")
    print(f"cache    {reason}", flush=True)
    filling = time.monotonic()
    place, computed = fill_all([inputs, test_inputs], place, device, cache)
    fill_seconds = time.monotonic() - filling
    if computed:
        print(f"         filled in {fill_seconds:.1f} s, {computed / fill_seconds:,.0f} images/s", flush=True)
    if place == "disk":
        print(f"         {'kept for later runs' if computed else 'computed by an earlier run'}; to delete: rm -r {cache}")

    cuda = device.type == "cuda"
    optimizer = torch.optim.Adam(freeze.param_groups(model, unfrozen, rates), fused=True, capturable=cuda)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    labels, test_labels = train.labels.to(device), test.labels.to(device)
    loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        with autocast(device, precision):
            logits = tail(x)
        loss = F.cross_entropy(logits.float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss_sum.add_(loss.detach() * len(y))  # summed on the device: no step waits for a number
        correct.add_((logits.detach().argmax(1) == y).sum())

    if cuda and not scaler.is_enabled():  # a small network's hundreds of launches in one
        step = Replayed(step)
    history = []
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:
            group["capturable"] = cuda  # whatever device it comes from
        scaler.load_state_dict(checkpoint["scaler"])
        history, began = list(checkpoint["history"]), began - checkpoint["seconds"]
        print(f"resumed  after epoch {len(history)}")
    about = {  # plain values, so that the checkpoint can be read with weights_only=True
        "architecture": "resnet18", "classes": list(train.classes), "stages": unfrozen,
        "arguments": plain(args), "learning_rates": rates,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "device": device_name(device), "precision": precision, "fill_seconds": fill_seconds,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                     "torchvision": torchvision.__version__, "numpy": np.__version__},
    }
    print("    epoch  train loss  accuracy   test loss  accuracy   seconds", flush=True)
    for epoch in range(len(history) + 1, max(directories) + 1):
        start = time.monotonic()
        freeze.train_mode(model, unfrozen)
        order, flips = data.epoch_order(len(inputs), args.seed, epoch)
        loss_sum.zero_()
        correct.zero_()
        targets = labels[order.to(device)].split(args.batch_size)
        for number, (x, y) in enumerate(zip(inputs.batches(args.batch_size, order, flips), targets), start=1):
            step(x, y)
            data.progress(f"epoch {epoch}: step {number:,} of {len(targets):,}")
        train_loss, train_accuracy = loss_sum.item() / len(inputs), correct.item() / len(inputs)
        trained = time.monotonic()
        data.progress(f"epoch {epoch}: testing")
        test_loss, test_accuracy = score(predict(tail, test_inputs.batches(128), device, precision), test_labels)
        if not math.isfinite(train_loss + test_loss):
            used = " ".join(f"{stage}={rates[stage]:g}" for stage in unfrozen)
            raise FloatingPointError(f"the loss is not finite in epoch {epoch} with --lr {used}: try lower rates; "
                                     f"{directories[max(directories)]} keeps epoch {epoch - 1}, if there was one")
        values = (epoch, train_loss, train_accuracy, test_loss, test_accuracy, trained - start, time.monotonic() - trained)
        drift = {f"{name}_drift": freeze.distance(stage, start) for name, (stage, start) in started.items()}
        history.append(dict(zip(HISTORY, values, strict=True)) | drift)
        for epochs, directory in directories.items():
            if len(done[epochs]) < epoch <= epochs:  # what has come further is not taken back
                about["arguments"]["epochs"] = epochs
                file = io.BytesIO()  # torch.save says less than a sentence when a disk is full
                torch.save(about | {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history,
                                    "scaler": scaler.state_dict(), "seconds": time.monotonic() - began}, file)
                data.write_file(directory / "checkpoint.pt", file.getbuffer())
                write_csv(directory / "history.csv", history[0], [row.values() for row in history])
        data.progress()
        print(f"{epoch:4}/{max(directories):<4} {train_loss:11.4f} {train_accuracy:9.2%} {test_loss:11.4f} "
              f"{test_accuracy:9.2%} {time.monotonic() - start:9.1f}", flush=True)
        if epoch in directories:
            print(f"saved    {directories[epoch]}/checkpoint.pt and history.csv, {time.monotonic() - began:.1f} s in all")


if __name__ == "__main__":
    command(main, "to go on after the last finished epoch, run the same command with --resume")
