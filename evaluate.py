"""Score checkpoints of train.py: the whole network, the whole test set, no cache.

    python evaluate.py results/*/epoch10.pt
    python evaluate.py results/*/epoch*.pt --csv scores.csv
    python evaluate.py results/cifar10-fc+layer4-*/epoch10.pt --per-class
    python evaluate.py results/cifar10-fc+layer4-*/epoch10.pt --image cat.jpg dog.png
    python evaluate.py results/pictures-*/epoch10.pt --image FOLDER --csv predictions.csv

What --per-class writes lies beside the checkpoint.
"""

import plumbing  # isort: skip  # noqa: F401  # before torch, for whose threads it sets something
import sys
from argparse import Namespace
from pathlib import Path

import torch
from PIL import Image

from data import Images, UserError, read_picture
from plumbing import datasets, machine
from plumbing.cli import Parser, command, paths
from plumbing.files import whole_file, writable, write_rows
from plumbing.flags import folder
from plumbing.pictures import find_pictures
from plumbing.report import metrics, predict, prepared, print_row
from plumbing.settings import ROOT, changed_names, in_words, recipe_code
from plumbing.weights import Trained, load_model, read_checkpoint, summary_row

MISTAKES = 12  # the most confident ones, which --per-class keeps as pictures


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="epochN.pt files of train.py")
    add("--csv", type=writable, metavar="FILE",
        help="write a row per checkpoint to this file, or with --image a row per picture")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--per-class", action="store_true",
        help="accuracy per class; beside the checkpoint the confusion matrix and the mistakes")
    either("--image", nargs="+", default=[], metavar="PICTURE",
        help="after the checkpoints: the five likeliest classes of these pictures or folders")
    add("--data-dir", type=folder, metavar="DIR",
        help="where the data set is now (default: where it was)")
    add("--device", type=machine.device_flag, help="default: as in training")
    add("--precision", choices=["auto", *machine.PRECISIONS], help="default: as in training")
    # fmt: on
    args = parser.parse_args(argv)
    args.checkpoints = paths(args.checkpoints)
    if args.image and args.csv and len(args.checkpoints) > 1:
        raise UserError("--image with --csv takes one checkpoint: a row is one picture's")
    if args.image and args.data_dir:
        raise UserError("--data-dir is for scoring: --image names pictures of no data set")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    pictures = [file for path in paths(args.image) for file in find_pictures(Path(path))]
    test_sets = datasets.TestSets()  # many checkpoints share one test set
    rows, failed = [], False
    for path in args.checkpoints:
        try:
            trained = load_model(read_checkpoint(path), args.device, args.precision)
            warn_of_other_code(path, trained)
            if args.image:
                rows = name_pictures(path, trained, pictures)
                failed |= len(rows) < len(pictures)
            else:
                images = test_sets.of(trained.checkpoint, args.data_dir)
                rows.append(score(path, trained, images, args.per_class, header=not rows))
        except UserError as error:  # the others are scored all the same
            about = "" if path in str(error) else f"{path}: "
            complain(f"{about}{error}")
            failed = True
    if args.csv and rows:
        write_rows(args.csv, rows)
    if failed:
        sys.exit(2)


def score(path: str, trained: Trained, images: Images, per_class: bool, header: bool) -> dict:
    """Score one checkpoint on its test set, print its line, and give its row of the CSV."""
    batches = prepared(images.pixels, trained.image_size, trained.device)
    logits = predict(trained.model, batches, trained.device, trained.precision).cpu()
    scores = {f"test_{name}": value for name, value in metrics(logits, images.labels).items()}
    row = summary_row(path, trained.checkpoint, scores) | {"test_images": len(images.labels)}
    print_row(row, header)
    if per_class:
        report_classes(Path(path), logits, images)
    return row


def warn_of_other_code(path: str, trained: Trained) -> None:
    """A network is scored with today's transform and stages, whatever it was trained with."""
    before, now = trained.checkpoint["settings"]["code"], recipe_code(ROOT / "train.py")
    changed = {name for name in changed_names(before, now) if name.startswith(("data.", "freeze."))}
    if changed:
        print(f"warning: {path} was trained with another {in_words(changed)}", flush=True)


def complain(error: UserError | str) -> None:
    print(f"evaluate.py: error: {error}", file=sys.stderr, flush=True)


def name_pictures(path: str, trained: Trained, files: list[Path]) -> list[dict]:
    """Print the five likeliest classes of each picture, which is resized as the training pictures
    were: to their size, then to the network's. Gives a row of the CSV for each that can be read."""
    rows, classes = [], trained.checkpoint["settings"]["classes"]
    print(path)
    for start in range(0, len(files), 128):
        named, pictures = [], []
        for file in files[start : start + 128]:
            try:
                pictures.append(read_picture(file, trained.checkpoint["metadata"]["picture_size"]))
                named.append(file)
            except UserError as error:
                complain(error)
        if not named:
            continue
        batches = prepared(torch.cat(pictures), trained.image_size, trained.device)
        logits = predict(trained.model, batches, trained.device, trained.precision)
        for file, probabilities in zip(named, logits.softmax(1).cpu()):
            best = probabilities.topk(min(5, len(classes)))
            likely = [f"{classes[i]} {p:.1%}" for p, i in zip(best.values, best.indices)]
            print(f"{file}: {', '.join(likely)}")
            chances = probabilities.tolist()
            row = {"file": file, "class": classes[best.indices[0]], "probability": max(chances)}
            rows.append(row | dict(zip(classes, chances)))
    return rows


def report_classes(path: Path, logits: torch.Tensor, images: Images) -> None:
    """Print the accuracy of each class; write the confusion matrix, a row per true class, and
    the mistakes made with most confidence, beside the checkpoint."""
    count = len(images.classes)
    probabilities, said = logits.softmax(1).max(1)
    confusion = torch.bincount(images.labels * count + said, minlength=count**2).view(count, count)
    table = []
    for name, row, correct in zip(images.classes, confusion, confusion.diag()):
        table.append({"true class": name} | dict(zip(images.classes, row.tolist())))
        if row.sum() == 0:
            print(f"{'':36}{name}: no test pictures")
        else:
            print(f"{correct / row.sum():32.2%}    {name}, {correct:,} of {row.sum():,}")
    write_rows(path.with_suffix(".confusion.csv"), table)
    # The mistakes, as PNG files and a list of them.
    wrong = (said != images.labels).nonzero().flatten()
    worst = wrong[probabilities[wrong].argsort(descending=True)][:MISTAKES]
    mistakes, rows = path.with_suffix(".mistakes"), []
    mistakes.mkdir(exist_ok=True)
    for file in mistakes.glob("*.png"):
        file.unlink()
    for number, i in enumerate(worst.tolist(), start=1):
        with whole_file(mistakes / f"{number:02}.png") as part:
            Image.fromarray(images.pixels[i].numpy()).save(part, "PNG")
        about = {"file": f"{number:02}.png", "true": images.classes[images.labels[i]]}
        about |= {"said": images.classes[said[i]], "probability": probabilities[i].item()}
        rows.append(about)
    write_rows(mistakes / "mistakes.csv", rows, ("file", "true", "said", "probability"))
    print(f"{'':34}beside it: {path.stem}.confusion.csv, {path.stem}.mistakes/")


if __name__ == "__main__":
    command(main, when_stopped="the table is written at the end", when_full="try --device cpu")
