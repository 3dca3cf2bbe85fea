"""Score checkpoints of train.py: the whole model, the whole test set, no cache.

    python evaluate.py results/*/checkpoint.pt
    python evaluate.py results/*/checkpoint.pt --csv results/summary.csv
    python evaluate.py results/*/checkpoint.pt --csv results/summary.csv --logged
    python evaluate.py results/*-e10-s0/checkpoint.pt --paired results/paired.csv
    python evaluate.py results/*-layer4-e10-s0/checkpoint.pt --per-class
    python evaluate.py results/*-layer4-e10-s0/checkpoint.pt --cka
    python evaluate.py results/*-layer4-e10-s0/checkpoint.pt --image cat.jpg
"""

import argparse
import base64
import functools
import io
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import freeze
from machine import DEVICES, PRECISIONS, autocast, command, keep_memory, pick_device, pick_precision
from runs import fingerprint, read_checkpoint


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


def prepared(pixels: torch.Tensor, image_size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Images as the network sees them, 128 at a time, with live progress."""
    for start in range(0, len(pixels), 128):
        yield data.transform(pixels[start:start + 128].to(device), image_size)
        data.progress(f"scoring: {min(start + 128, len(pixels)):,} of {len(pixels):,} images")
    data.progress()


@torch.inference_mode()
def stage_features(model: nn.Module, pixels: torch.Tensor, image_size: int, device: torch.device, precision: str) -> dict[str, torch.Tensor]:
    """Each backbone stage's output in eval mode, computed in `precision` and averaged over the picture,
    float64 [N, channels] by stage."""
    *backbone, _ = freeze.stages(model.to(device).eval()).items()
    parts = {name: [] for name, _ in backbone}
    for x in prepared(pixels, image_size, device):
        for name, stage in backbone:
            with autocast(device, precision):
                x = stage(x)
            parts[name].append(x.float().mean((2, 3)).cpu().double())
    return {name: torch.cat(kept) for name, kept in parts.items()}


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """How alike two networks' features of the same N images are, [N, channels] each: linear centered
    kernel alignment, from 0 to 1 (the same but for rotation and scale). Kornblith et al. 2019,
    "Similarity of Neural Network Representations Revisited", arXiv:1905.00414, section 3."""
    x, y = x - x.mean(0), y - y.mean(0)
    return ((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def summary_row(path: str, checkpoint: dict, loss: float, accuracy: float, test_images: int) -> dict:
    """A checkpoint's row of summary.csv; seconds, device and precision are those of its training."""
    arguments, settings, last = checkpoint["arguments"], checkpoint["settings"], checkpoint["history"][-1]
    return {"run": Path(path).resolve().parent.name, "dataset": arguments["dataset"], "unfrozen": "+".join(checkpoint["stages"]),
            "epochs": last["epoch"], "seed": arguments["seed"], "train_loss": last["train_loss"], "test_loss": loss,
            "test_accuracy": accuracy, "trainable_parameters": checkpoint["trainable_parameters"],
            "seconds": checkpoint["seconds"], "device": checkpoint["device"], "precision": checkpoint["precision"],
            "torch": checkpoint["versions"]["torch"], "learning_rates": settings["--lr"],
            "weights": Path(arguments["weights"]).stem, "train_images": checkpoint["train_images"],
            "test_images": test_images, "frozen_batchnorm": settings["--frozen-batchnorm"]}


def paired(correct: torch.Tensor, other: torch.Tensor) -> tuple[float, float, int, int]:
    """How much more accurate one network is than another on the same images, its standard error, and
    how many images only the one and only the other got right; bool [N] each. The images that both get
    right, or both wrong, say nothing about the difference (McNemar 1947)."""
    only, only_other, count = (correct & ~other).sum().item(), (other & ~correct).sum().item(), len(correct)
    difference = (only - only_other) / count
    return difference, ((only + only_other) / count - difference**2) ** 0.5 / count**0.5, only, only_other


def report_pairs(file: str, runs: list[tuple[str, str, torch.Tensor]]) -> bool:
    """Prints and writes every comparison of two runs on the same images, and tells whether there is
    one. runs: (name, images, correct)."""
    rows = [(name, other, *paired(correct, other_correct), len(correct))
            for (other, images, other_correct), (name, same, correct) in itertools.combinations(runs, 2) if images == same]
    for name, other, difference, error, only, only_other, count in rows:
        print(f"{name}\n  against {other}: {100 * difference:+.2f} ± {100 * error:.2f} points,\n"
              f"  {only:,} of {count:,} images right that the other gets wrong, {only_other:,} the other way round")
    header = ["run", "other", "difference", "standard_error", "only_run_right", "only_other_right", "test_images"]
    if rows:
        data.write_csv(file, header, rows)
    return bool(rows)


def report_classes(folder: Path, logits: torch.Tensor, images: data.Images) -> None:
    """Prints the accuracy of each class; writes the confusion matrix, a row per true class, and the
    twelve mistakes made with most confidence."""
    count = len(images.classes)
    probabilities, said = logits.softmax(1).max(1)
    confusion = torch.bincount(images.labels * count + said, minlength=count**2).view(count, count)
    for name, row, correct in zip(images.classes, confusion, confusion.diag()):
        print(f"{'':21} {correct / row.sum().clamp(min=1):10.2%}    {name}, {correct:,} of {row.sum():,}")
    data.write_csv(folder / "confusion.csv", ["true class", *images.classes], [[n, *r.tolist()] for n, r in zip(images.classes, confusion)])
    mistakes = []
    for i in torch.where(said == images.labels, -1.0, probabilities).argsort(descending=True)[:12].tolist():
        if said[i] != images.labels[i]:
            png = io.BytesIO()
            Image.fromarray(images.pixels[i].numpy()).save(png, "PNG")
            mistakes.append((images.classes[images.labels[i]], images.classes[said[i]], probabilities[i].item(),
                             base64.b64encode(png.getvalue()).decode()))
    data.write_csv(folder / "mistakes.csv", ["true", "said", "probability", "png"], mistakes)
    print(f"{'':34}confusion matrix and mistakes: {folder}/confusion.csv, mistakes.csv")


def report_cka(folder: Path, checkpoint: dict, model: nn.Module, pixels: torch.Tensor, device: torch.device, precision: str) -> None:
    """Prints and writes linear CKA with the pretrained network for every stage that learned."""
    arguments = checkpoint["arguments"]
    pretrained = freeze.build(len(checkpoint["classes"]), freeze.load_weights(arguments["weights"]), arguments["seed"])
    if fingerprint(*pretrained.state_dict().values()) != checkpoint["settings"]["weights of sha256"]:
        raise ValueError(f"{arguments['weights']} is not what the run began with: --cka compares with that")
    rows = []
    if learned := checkpoint["stages"][:-1]:
        now, before = (stage_features(network, pixels, arguments["image_size"], device, precision) for network in (model, pretrained))
        rows = [(stage, linear_cka(now[stage], before[stage])) for stage in learned]
    for stage, cka in rows:
        print(f"{'':21} {cka:10.4f}    CKA of {stage} with the pretrained one")
    data.write_csv(folder / "cka.csv", ["stage", "cka"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="checkpoint.pt files of train.py")
    parser.add_argument("--csv", metavar="FILE", help="write a row per checkpoint to this file")
    parser.add_argument("--paired", metavar="FILE", help="compare every two checkpoints image by image, and write that to this file")
    parser.add_argument("--logged", action="store_true", help="what training logged for its last epoch, without scoring again")
    parser.add_argument("--per-class", action="store_true", help="accuracy per class, confusion.csv and mistakes.csv")
    parser.add_argument("--cka", action="store_true", help="similarity of the features to the pretrained ones, and cka.csv")
    parser.add_argument("--image", nargs="+", metavar="PICTURE",
                        help="after the checkpoints: the top five classes of these pictures, no scoring")
    parser.add_argument("--data-dir", help="where the data set is now (default: where it was)")
    parser.add_argument("--device", choices=DEVICES, help="default: as in training")
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], help="default: as in training")
    args = parser.parse_args(argv)
    if args.logged and (args.image or args.per_class or args.cka):
        parser.error("--logged scores nothing, --image, --per-class and --cka do: one at a time")
    if args.image and (args.csv or args.paired or args.per_class or args.cka):
        parser.error("--image names pictures; --csv, --paired, --per-class and --cka take the test set: one at a time")
    keep_memory()
    load = functools.lru_cache(maxsize=1)(data.load)  # many checkpoints share one test set
    rows, answers, failed = [], [], False
    try:
        for file in filter(None, (args.csv, args.paired)):
            data.check_writable(file)
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
                print(path)
                for file, probabilities in zip(args.image, predict(model, prepared(pixels, size, device), device, precision).softmax(1)):
                    best = probabilities.topk(min(5, len(classes)))
                    print(f"{file}: " + ", ".join(f"{classes[i]} {p:.1%}" for p, i in zip(best.values, best.indices)))
                continue
            if args.logged:
                last = checkpoint["history"][-1]
                loss, accuracy, correct = last["test_loss"], last["test_accuracy"], checkpoint["test_correct"]
                test_set = checkpoint["settings"]["test images of sha256"]
            else:
                images = load(arguments["dataset"], "test", args.data_dir or arguments["data_dir"], size, classes)
                logits = predict(model, prepared(images.pixels, size, device), device, precision).cpu()
                loss, accuracy = score(logits, images.labels)
                correct, test_set = logits.argmax(1) == images.labels, fingerprint(images.pixels, images.labels)
            row = summary_row(path, checkpoint, loss, accuracy, len(correct))
            if not rows:
                print("train loss  test loss   accuracy  images  run")
            print(f"{row['train_loss']:10.4f} {row['test_loss']:10.4f} {row['test_accuracy']:10.2%} {len(correct):7,}  "
                  + row["run"], flush=True)
            rows.append(row)
            answers.append((row["run"], test_set, correct))
            if args.per_class:
                report_classes(Path(path).parent, logits, images)
            if args.cka:
                report_cka(Path(path).parent, checkpoint, model, images.pixels, device, precision)
        except (OSError, ValueError) as error:  # said, and the others scored all the same
            data.progress()
            print(f"evaluate.py: error: {error if path in str(error) else f'{path}: {error}'}", file=sys.stderr)
            failed = True
    if args.csv and rows:
        data.write_csv(args.csv, rows[0], [row.values() for row in rows])
    if args.paired and rows and not report_pairs(args.paired, answers):
        parser.error("--paired takes two checkpoints or more, of the same test images")
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    command(main, when_stopped="the table is written when all is scored, not before", when_full="try --device cpu")
