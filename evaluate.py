"""Score checkpoints of train.py: the whole model, the whole test set, no cache.

    python evaluate.py results/*/checkpoint.pt
    python evaluate.py results/*/checkpoint.pt --csv results/summary.csv
    python evaluate.py results/*-layer4-e10-s0/checkpoint.pt --per-class
    python evaluate.py results/*-layer4-e10-s0/checkpoint.pt --image cat.jpg

--per-class also writes the confusion matrix, to confusion.csv beside the
checkpoint.
"""

import argparse
import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from machine import DEVICES, PRECISIONS, autocast, command, keep_memory, pick_device, pick_precision
from runs import read_checkpoint, write_csv

SUMMARY = ("run", "dataset", "unfrozen", "epochs", "seed", "train_loss", "test_loss", "test_accuracy",
           "trainable_parameters", "seconds", "device", "precision", "torch")


# ---------------------------------------------------------------- scoring


@torch.inference_mode()
def predict(model: nn.Module, inputs: Iterable[torch.Tensor], device: torch.device, precision: str) -> torch.Tensor:
    """Logits, float32 [N, classes] on the device, of a model or a tail in eval mode over batches."""
    model.eval()
    with autocast(device, precision):
        return torch.cat([model(batch).float() for batch in inputs])


def score(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy in [0, 1]; logits [N, classes], labels int64 [N]."""
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).sum().item() / len(labels)


def whole_model_logits(model: nn.Module, pixels: torch.Tensor, image_size: int, device: torch.device,
                       precision: str) -> torch.Tensor:
    """Logits, float32 [N, classes] on the CPU, of a whole model for uint8 [N, H, W, 3]."""

    def batches() -> Iterator[torch.Tensor]:
        for start in range(0, len(pixels), 128):
            yield data.transform(pixels[start:start + 128].to(device), image_size)
            data.progress(f"scoring: {start:,} of {len(pixels):,} images")

    logits = predict(model, batches(), device, precision).cpu()
    data.progress()
    return logits


def summary_row(path: str, checkpoint: dict, loss: float, accuracy: float) -> dict:
    """A checkpoint's row of summary.csv; seconds, device and precision are those of its training."""
    arguments, history = checkpoint["arguments"], checkpoint["history"]
    values = (Path(path).resolve().parent.name, arguments["dataset"], "+".join(checkpoint["stages"]), len(history),
              arguments["seed"], history[-1]["train_loss"], loss, accuracy, checkpoint["trainable_parameters"],
              checkpoint["seconds"], checkpoint["device"], checkpoint["precision"], checkpoint["versions"]["torch"])
    return dict(zip(SUMMARY, values, strict=True))


def report_classes(file: Path, logits: torch.Tensor, images: data.Images) -> None:
    """Prints the accuracy of each class and writes the confusion matrix, a row per true class."""
    count = len(images.classes)
    pairs = images.labels * count + logits.argmax(1)
    confusion = torch.bincount(pairs, minlength=count**2).view(count, count)
    for name, row, correct in zip(images.classes, confusion, confusion.diag()):
        print(f"{'':21} {correct / row.sum().clamp(min=1):10.2%}    {name}, {correct:,} of {row.sum():,}")
    write_csv(file, ["true class", *images.classes], [[n, *r.tolist()] for n, r in zip(images.classes, confusion)])
    print(f"{'':34}confusion matrix: {file}")


def print_top_five(path: str, files: list[str], logits: torch.Tensor, classes: tuple[str, ...]) -> None:
    print(path)
    for file, probabilities in zip(files, logits.softmax(1)):
        best = probabilities.topk(min(5, len(classes)))
        print(f"{file}: " + ", ".join(f"{classes[i]} {p:.1%}" for p, i in zip(best.values, best.indices)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="checkpoint.pt files of train.py")
    parser.add_argument("--csv", metavar="FILE", help="write a row per checkpoint to this file")
    parser.add_argument("--per-class", action="store_true", help="accuracy per class, and confusion.csv")
    parser.add_argument("--image", nargs="+", metavar="PICTURE",
                        help="after the checkpoints: the top five classes of these pictures, no scoring")
    parser.add_argument("--data-dir", help="where the data set is now (default: where it was)")
    parser.add_argument("--device", choices=DEVICES, help="default: as in training")
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], help="default: as in training")
    args = parser.parse_args(argv)
    if args.image and (args.csv or args.per_class):
        parser.error("--image names pictures, --csv and --per-class score the test set: one at a time")
    if args.csv and Path(args.csv).is_dir():
        parser.error(f"--csv {args.csv} is a folder: name a file")
    keep_memory()
    load = functools.lru_cache(maxsize=1)(data.load)  # many checkpoints share one test set
    rows, failed = [], False
    try:
        pictures = [data.read_image(file) for file in args.image or []]
    except OSError as error:
        parser.error(str(error))
    for path in args.checkpoints:
        try:
            checkpoint, model = read_checkpoint(path)
            arguments, classes = checkpoint["arguments"], tuple(checkpoint["classes"])
            size = arguments["image_size"]
            device = pick_device(args.device or arguments["device"])
            precision = pick_precision(args.precision or arguments["precision"], device)
            model.to(device)
            if pictures:
                pixels = torch.from_numpy(np.stack([picture.resize((size, size), data.BILINEAR) for picture in pictures]))
                print_top_five(path, args.image, whole_model_logits(model, pixels, size, device, precision), classes)
                continue
            images = load(arguments["dataset"], "test", args.data_dir or arguments["data_dir"], size, classes)
            logits = whole_model_logits(model, images.pixels, size, device, precision)
            row = summary_row(path, checkpoint, *score(logits, images.labels))
            if not rows:
                print("train loss  test loss   accuracy  images  run")
            print(f"{row['train_loss']:10.4f} {row['test_loss']:10.4f} {row['test_accuracy']:10.2%} {len(logits):7,}  "
                  + row["run"], flush=True)
            rows.append(row)
            if args.per_class:
                report_classes(Path(path).with_name("confusion.csv"), logits, images)
        except (OSError, ValueError) as error:  # said, and the others scored all the same
            data.progress()
            print(f"evaluate.py: error: {error if path in str(error) else f'{path}: {error}'}", file=sys.stderr)
            failed = True
    if args.csv and rows:
        try:
            write_csv(args.csv, SUMMARY, [row.values() for row in rows])
        except OSError as error:
            parser.error(f"--csv: {error}")
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    command(main, "the table is written when all is scored, not before")
