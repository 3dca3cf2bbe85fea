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
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

import data
import freeze
import runs
from evaluate import predict, score
from features import PLACES, Features, choose_place, fill_all
from machine import DEVICES, PRECISIONS, autocast, command, device_name, keep_memory, pick_device, pick_precision
from replay import Replayed


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
    add("--frozen-batchnorm", choices=["eval", "train"], default="eval",
        help="train: the usual mistake, to see what it costs; nothing can be computed once then (default: eval)")
    add("--batch-size", type=whole_number(1), default=128, help="default: 128")
    add("--image-size", type=whole_number(32, 4096), default=224,
        help="side of the square the network sees (default: 224)")
    add("--dataset", choices=data.DATASETS, default="cifar10", help="default: cifar10")
    add("--data-dir", type=lambda path: Path(path).resolve(), default="data",
        help="where the data set is, or is downloaded to (default: data)")
    add("--weights", default="imagenet", type=lambda name: name if name in ("imagenet", "none") else str(Path(name).resolve()),
        help="imagenet (default), none, or the path of a state_dict")
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
    name += "-mistake" if args.frozen_batchnorm == "train" else ""
    name += f"-b{args.batch_size}" if args.batch_size != 128 else ""
    name += f"-px{args.image_size}" if args.image_size != 224 else ""
    name += f"-{Path(args.weights).stem}" if args.weights != "imagenet" else ""
    name += f"-{args.precision}" if args.precision != "auto" else ""
    return name + "".join(f"-{stage}={rate:g}" for stage, rate in sorted(dict(args.lr).items()) if rate != freeze.LEARNING_RATES.get(stage))


def main(argv: list[str] | None = None) -> None:
    with contextlib.ExitStack() as held:
        run(argv, held)


def run(argv: list[str] | None, held: contextlib.ExitStack) -> None:
    began = time.monotonic()
    parser, args = parse(argv)
    unfrozen = [stage for stage in freeze.STAGES if stage in [*args.unfreeze, "fc"]]
    in_train_mode = unfrozen if args.frozen_batchnorm == "eval" else freeze.STAGES
    rates = freeze.LEARNING_RATES | dict(args.lr)
    keep_memory()
    try:
        if frozen := {stage for stage, _ in args.lr} - set(unfrozen):
            raise ValueError(f"--lr {frozen.pop()}=...: only what learns has a rate, here {' and '.join(unfrozen)}")
        device = pick_device(args.device)
        precision = pick_precision(args.precision, device)
        weights = freeze.load_weights(args.weights)
        train = data.load(args.dataset, "train", args.data_dir, args.image_size)
        if args.train_size:
            train = data.stratified_subset(train, args.train_size, args.seed)
        test = data.load(args.dataset, "test", args.data_dir, args.image_size, train.classes)
        if len(train.classes) < 2:
            raise ValueError(f"{args.data_dir} holds one class, {train.classes[0]}: telling classes apart takes two")
        last_batch = len(train.labels) % args.batch_size or args.batch_size
        if last_batch == 1 and args.image_size == 32 and "layer4" in in_train_mode:
            raise ValueError(f"--batch-size {args.batch_size} leaves a batch of one of the {len(train.labels)} images, "
                             "from which layer4's BatchNorm cannot learn at --image-size 32: change either")
        model = freeze.build(len(train.classes), weights, args.seed).to(device)
        learning_rates = " ".join(f"{stage}={rates[stage]:g}" for stage in unfrozen)
        settings = {  # what makes a run the run it is
            "--unfreeze": " ".join(unfrozen), "--frozen-batchnorm": args.frozen_batchnorm,
            "--lr": learning_rates, "--batch-size": args.batch_size, "--image-size": args.image_size, "--train-size": args.train_size or "all", "--seed": args.seed,
            "--device": device.type, "--precision": precision, "classes": ", ".join(train.classes),
            "train images of sha256": runs.fingerprint(train.pixels, train.labels),
            "test images of sha256": runs.fingerprint(test.pixels, test.labels),
            "weights of sha256": runs.fingerprint(*model.state_dict().values()),
        }
        directories = {epochs: args.out / run_name(args, unfrozen, epochs) for epochs in sorted(args.epochs)}
        for directory in directories.values():
            held.enter_context(runs.locked(directory))
        saved = runs.begun(directories, settings)  # another run is not replaced, even without --resume
        if not args.resume:
            saved = {}
        done = {epochs: len(saved[epochs]["history"]) if epochs in saved else 0 for epochs in directories}
        for epochs in [epochs for epochs in directories if done[epochs] >= epochs]:
            directory = directories.pop(epochs)
            runs.write_history(directory, saved[epochs]["history"])  # in case it was killed just before that
            print(f"{directory}: finished")
        if not directories:
            return
        usable = [begun for begun in saved.values() if len(begun["history"]) < min(directories)]
        checkpoint = max(usable, key=lambda begun: len(begun["history"]), default=None)  # what spares most epochs
        pretrained = {name: (stage, freeze.vector(stage)) for name, stage in freeze.stages(model).items()
                      if name in unfrozen[:-1]}
        if checkpoint:
            model.load_state_dict(checkpoint["model"])
        freeze.freeze(model, unfrozen)
        prefix, tail = freeze.split(model, in_train_mode)
        dtype = PRECISIONS[precision]
        inputs = Features(prefix, train.pixels, args.image_size, device, dtype, mirrored=True)
        test_inputs = Features(prefix, test.pixels, args.image_size, device, dtype, mirrored=False)
        cache = args.out / "features"
        place, reason = choose_place(args.cache, [inputs, test_inputs], device, cache)
    except (OSError, ValueError) as error:
        data.progress()
        parser.error(str(error))

    print(*directories.values(), sep="\n")
    print(f"data     {len(train.labels):,} train and {len(test.labels):,} test images, {len(train.classes)} classes")
    print(f"{'stage':<8} {'parameters':>12}")
    for name, stage in freeze.stages(model).items():
        count = sum(parameter.numel() for parameter in stage.parameters())
        print(f"{name:<8} {count:>12,}  " + (f"learns at {rates[name]:g}" if name in unfrozen
              else "frozen, BatchNorm in train mode" if name in in_train_mode else "frozen"))
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
    torch.backends.cudnn.benchmark = cuda
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

    if cuda:  # a small network's hundreds of launches in one
        step = Replayed(step)
    history = []
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        history, began = list(checkpoint["history"]), began - checkpoint["seconds"]
        print(f"resumed  after epoch {len(history)}")
    about = {  # plain values, so that weights_only=True, which runs nothing hidden in a file, can read them
        "architecture": "resnet18", "classes": list(train.classes), "stages": unfrozen, "settings": settings,
        "train_images": len(inputs), "test_images": len(test_inputs),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "device": device_name(device), "precision": precision, "fill_seconds": fill_seconds,
        "versions": {"torch": str(torch.__version__), "torchvision": torchvision.__version__},
    }
    print("    epoch  train loss  accuracy   test loss  accuracy   seconds", flush=True)
    longest = max(directories)
    written, writing = time.monotonic(), 0.0
    for epoch in range(len(history) + 1, longest + 1):
        start = time.monotonic()
        freeze.train_mode(model, in_train_mode)
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
        logits = predict(tail, test_inputs.batches(128), device, precision)
        test_loss, test_accuracy = score(logits, test_labels)
        if not math.isfinite(train_loss + test_loss):
            raise FloatingPointError(f"the loss is not finite in epoch {epoch} with --lr {learning_rates}: try lower rates"
                                     + (f"; {directories[longest]} keeps epoch {done[longest]}" if done[longest] else ""))
        history.append({"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy, "test_loss": test_loss,
                        "test_accuracy": test_accuracy, "seconds": time.monotonic() - start, "train_seconds": trained - start}
                       | {f"{name}_drift": freeze.distance(stage, before) for name, (stage, before) in pretrained.items()})
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                 "test_correct": (logits.argmax(1) == test_labels).cpu(), "history": history, "seconds": time.monotonic() - began}
        due = epoch in directories or time.monotonic() - written >= 20 * writing  # under 5% of the time
        for epochs in sorted({epoch, longest} & directories.keys()):  # the short run first: the long one goes on from it
            if due and epoch > done[epochs]:  # what has come further is not taken back
                written = time.monotonic()
                runs.write(directories[epochs], about | state)
                writing = time.monotonic() - written
                done[epochs] = epoch
        data.progress()
        print(f"{epoch:4}/{longest:<4} {train_loss:11.4f} {train_accuracy:9.2%} {test_loss:11.4f} "
              f"{test_accuracy:9.2%} {time.monotonic() - start:9.1f}", flush=True)
        if epoch in directories:
            print(f"saved    {directories[epoch]}/checkpoint.pt and history.csv, {time.monotonic() - began:.1f} s in all")


if __name__ == "__main__":
    command(main, when_stopped="to go on after the last finished epoch, run the same command with --resume",
            when_full="lower --batch-size or --image-size, or try --cache off")
