"""Draw a folder of runs: pictures from the CSV files alone.

    python plot.py                # study/results/h100, the runs of the README
    python plot.py results        # your own

Reads summary.csv (compare.py --csv, evaluate.py --csv), every run's
history.csv, and where evaluate.py --per-class has written them, the confusion
matrices and the mistakes.
"""

import csv
import itertools
import os
import textwrap
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook leaves another name here
import matplotlib
import numpy as np
from matplotlib import font_manager, pyplot
from matplotlib.ticker import MaxNLocator, PercentFormatter

from plumbing.cli import Parser, UserError, command

# Colours that the colour-blind can tell apart (Okabe and Ito 2008); lines and markers that a
# black and white print can.
STYLES = {
    "fc": {"color": "#009E73", "linestyle": ":", "marker": "s"},
    "fc+layer4": {"color": "#D55E00", "linestyle": "--", "marker": "^"},
    "fc+layer3+layer4": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
}
OTHERS = [
    {"color": "#CC79A7", "linestyle": "-.", "marker": "D"},
    {"color": "#E69F00", "linestyle": "-.", "marker": "v"},
    {"color": "#56B4E9", "linestyle": "-.", "marker": "P"},
    {"color": "#777777", "linestyle": "-.", "marker": "X"},
    {"color": "#000000", "linestyle": "-.", "marker": "*"},
]
PUBLISHED_RATES = {"layer3=1e-05", "layer4=0.0001", "fc=0.001"}  # which go without saying
# What runs share that are drawn together, and, of these, as one line beside their label.
KIND = ("dataset", "model", "weights", "precision")
SIZES = ("train_images", "image_size", "batch_size")
NUMBERS = ("epochs", "seed", "image_size", "batch_size", "train_images", "test_images")
LARGEST_MATRIX = 20  # classes whose counts are legible


# ---------------------------------------------------------------- reading


def read(folder: Path) -> list[dict]:
    """The summary's rows in the order to draw them, numbers as numbers, with a label, a style and
    the history, a dictionary of columns. Raises UserError."""
    summary = folder / "summary.csv"
    if not summary.exists():
        makes = f"python compare.py {folder}/*/epoch*.pt --csv {summary}"
        raise UserError(f"no {summary}: {makes} writes it")
    runs, file = [], summary
    try:
        for row in read_csv(summary):
            file = folder / row["run"] / "history.csv"
            runs.append(parsed(row, read_csv(file)))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        wrong = f"{file} or {summary} is not what train.py and compare.py write"
        raise UserError(f"{wrong} ({error!r})") from error
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror})") from error
    others = sorted({run["label"] for run in runs} - STYLES.keys())
    styles = STYLES | dict(zip(others, itertools.cycle(OTHERS)))
    for run in runs:
        run["style"] = styles[run["label"]]
    place = {label: number for number, label in enumerate(styles)}
    return sorted(runs, key=lambda run: (place[run["label"]], run["epochs"], *map(run.get, SIZES)))


def parsed(row: dict, lines: list[dict]) -> dict:
    """A run: its row of summary.csv, and as many epochs of its history as the row has."""
    run = row | {name: int(row[name]) for name in NUMBERS}
    run["test_accuracy"], run["seconds"] = float(row["test_accuracy"]), float(row["seconds"])
    lines = lines[: run["epochs"]]
    if len(lines) < run["epochs"]:
        raise ValueError(f"{len(lines)} epochs where the summary has {run['epochs']}")
    run["history"] = {}
    for name in lines[0]:
        numbers = [float(line[name] or "nan") for line in lines]  # blank where there was none
        run["history"][name] = np.array(numbers)
    run["label"] = label(row)
    return run


def label(row: dict[str, str]) -> str:
    """What a run's line is called: its strategy, and what is not as published."""
    name = row["strategy"]
    if name.count("+") == 5:
        name = "everything"
    if row.get("tag"):
        name += f" {row['tag']}"
    if row["frozen_batchnorm"] == "train":
        name += ", usual mistake"
    others = [rate for rate in row["learning_rates"].split() if rate not in PUBLISHED_RATES]
    if others:
        name += f" ({' '.join(others)})"
    return textwrap.fill(name, 44)


def read_csv(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8-sig") as opened:
        return list(csv.DictReader(opened))


def by(runs: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Groups of runs that agree in `keys`."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return groups


def find_fonts(texts: Iterable[str]) -> None:
    """Lets matplotlib take letters that its own font lacks, such as Chinese ones, from the system's
    fonts, and says which letters none of them has."""
    own = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    missing = {letter for text in texts for letter in text if letter.isprintable()}
    missing = {letter for letter in missing if ord(letter) not in own.get_charmap()}
    families = ["DejaVu Sans"]
    for file in sorted(font_manager.findSystemFonts()) if missing else ():
        try:
            font = font_manager.get_font(file)
            has = {letter for letter in missing if ord(letter) in font.get_charmap()}
            if has:
                font_manager.fontManager.addfont(file)
                families.append(font.family_name)
        except (OSError, RuntimeError):  # no font that can be drawn with
            continue
        missing -= has
    matplotlib.rcParams["font.family"] = families
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    if missing:
        letters = "".join(sorted(missing)[:20])
        print(f"no font here has {letters}: a box stands for each (Noto Sans CJK has the most)")


# ---------------------------------------------------------------- pictures


def curves(runs: list[dict], title: str) -> "pyplot.Figure":
    """Loss and accuracy by epoch in the longest runs: the mean over the seeds, their spread as a
    band."""
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    longest = {label: group for (label, _), group in by(runs, "label", "epochs").items()}
    split = "val" if "val_loss" in runs[0]["history"] else "test"
    columns = ("train_loss", f"{split}_loss", "train_accuracy", f"{split}_accuracy")
    for axis, column in zip(axes.flat, columns):
        for label, group in longest.items():
            draw_curve(axis, label, group, column)
        axis.set(xlabel="epoch", ylabel=column.replace("_", " "))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if "accuracy" in column:
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        else:
            axis.set_ylabel(f"{axis.get_ylabel()} (nats)")
    axes[0, 0].set_yscale("log")
    figure.suptitle(title, fontsize="medium")
    wide = 3 if len(longest) <= 3 else 2
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=wide, frameon=False)
    return figure


def draw_curve(axis, label: str, group: list[dict], column: str) -> None:
    """One line of the learning curves: the seeds of a group."""
    values = np.array([run["history"][column] for run in group])
    epoch, style = group[0]["history"]["epoch"], group[0]["style"]
    seeds = f"{len(group)} seeds" if len(group) > 1 else "1 seed"
    every = len(epoch) // 10 or 1
    name = f"{label} ({seeds})"
    axis.plot(epoch, values.mean(0), label=name, markersize=4, markevery=every, **style)
    low, high = values.min(0), values.max(0)
    axis.fill_between(epoch, low, high, color=style["color"], alpha=0.25, linewidth=0)


def table(runs: list[dict], title: str) -> "pyplot.Figure":
    """The accuracy after the last epoch, every seed of it."""
    groups = by(runs, "label", "epochs")
    height = 1.5 + 0.45 * sum(1 + label.count("\n") for label, _ in groups)
    figure, axis = pyplot.subplots(figsize=(9, height), layout="constrained")
    for row, group in enumerate(groups.values()):
        accuracies = np.array([run["test_accuracy"] for run in group])
        mean = accuracies.mean()
        error = np.sqrt(mean * (1 - mean) / group[0]["test_images"])
        style = group[0]["style"] | {"linestyle": "none"}
        axis.errorbar(mean, row, xerr=error, capsize=4, **style)
        axis.plot(accuracies, [row] * len(group), "|", color="black", markersize=12)
    axis.plot([], [], "k|", label="a seed")
    axis.plot([], [], "ko", label="their mean, ± the test set's standard error")
    axis.set_yticks(range(len(groups)), [f"{label}, {epochs} epochs" for label, epochs in groups])
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.set_title(title, fontsize="medium")
    axis.set(xlabel="test accuracy")
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def confusion(file: Path) -> "pyplot.Figure":
    """Which class is taken for which: a row per true class, the counts of the test set."""
    rows = read_csv(file)
    names = [row["true class"] for row in rows]
    counts = np.array([[int(row[name]) for name in names] for row in rows])
    title = ""
    if len(names) > LARGEST_MATRIX:
        wrong = counts - np.diag(counts.diagonal())
        most = np.sort(np.argsort(wrong.sum(0) + wrong.sum(1))[-LARGEST_MATRIX:])
        title = f"the {LARGEST_MATRIX} most confused of {len(names)} classes"
        names, counts = [names[i] for i in most], counts[np.ix_(most, most)]
    side = 1.5 + 0.6 * len(names)
    figure, axis = pyplot.subplots(figsize=(side, side), layout="constrained")
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    axis.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if shares[row, column] > 0.5 else "black"
        axis.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=8)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="said", ylabel="true", title=title)
    return figure


def mistakes(file: Path) -> "pyplot.Figure | None":
    """The wrong answers given with most confidence, as evaluate.py --per-class kept them."""
    rows = read_csv(file)
    if not rows:
        return None
    figure, axes = pyplot.subplots(2, 6, figsize=(12, 5), layout="constrained")
    for axis, row in zip(axes.flat, rows):
        axis.imshow(pyplot.imread(file.parent / row["file"]))
        probability = float(row["probability"])
        axis.set_title(f"said {row['said']} ({probability:.0%})\nis {row['true']}", fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    return figure


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    default = Path(__file__).parent / "study/results/h100"
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=default, help="default: study/results/h100")
    folder = parser.parse_args(argv).folder.expanduser()
    runs = read(folder)
    matrices = sorted(folder.glob("*/*.confusion.csv"))
    listed = sorted(folder.glob("*/*.mistakes/mistakes.csv"))
    texts = [file.read_text("utf-8-sig", "replace") for file in (*matrices, *listed)]
    find_fonts([*texts, *(run["dataset"] for run in runs)])
    kinds = by(runs, *KIND)
    differ = [name for name in KIND if len({key[KIND.index(name)] for key in kinds}) > 1]
    for runs in kinds.values():
        prefix = "".join(f"{runs[0][name]}-" for name in differ)
        draw_kind(folder, prefix, runs)
    for file in matrices:
        save(file.with_suffix(".png"), confusion, file)
    for file in listed:
        save(file.with_suffix(".png"), mistakes, file)


def draw_kind(folder: Path, prefix: str, runs: list[dict]) -> None:
    """Curves and table of the runs on most and largest images."""
    groups = by(runs, *SIZES)
    largest = groups[max(groups)]
    title = f"{largest[0]['train_images']:,} training images, {largest[0]['image_size']} pixels"
    save(folder / f"{prefix}curves.png", curves, largest, title)
    save(folder / f"{prefix}table.png", table, largest, title)
    if others := len(runs) - len(largest):
        print(f"not drawn: {others} runs on fewer or smaller images")


def save(file: Path, draw: Callable, what: list[dict] | Path, *more) -> None:
    """Draws it if there is something to draw; the picture appears whole or not at all."""
    try:
        figure = draw(what, *more)
    except (KeyError, ValueError, IndexError, OSError, SyntaxError) as error:  # the last: no PNG
        source = what if isinstance(what, Path) else file.parent
        raise UserError(f"{source} holds nothing to draw {file.name} from ({error!r})") from error
    if figure:
        part = file.with_name(f".{file.name}.part")
        try:
            figure.savefig(part, format="png", dpi=120)
            part.replace(file)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UserError(f"cannot write {file} ({error.strerror})") from error
        print(file)
    pyplot.close("all")


if __name__ == "__main__":
    command(main, when_stopped="the pictures drawn so far are whole", when_full="draw fewer runs")
