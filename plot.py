"""Draw a folder of runs: pictures from the CSV files alone.

    python plot.py                # study/results/h100
    python plot.py results        # your own

Reads summary.csv (compare.py --csv), every run's history.csv, and what
evaluate.py --per-class has written: confusion matrices and mistakes.
"""

import csv
import itertools
import os
import textwrap
from collections.abc import Callable
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook leaves another name here
import matplotlib
import numpy as np
from matplotlib import cycler, font_manager, pyplot
from matplotlib.ticker import MaxNLocator, PercentFormatter

from plumbing.cli import Parser, UserError, command

# Colours that the colour-blind can tell apart (Okabe and Ito 2008), and lines and markers that a
# black and white print can. The first three are those of these strategies.
STRATEGIES = ["fc", "fc+layer4", "fc+layer3+layer4"]
COLORS = ["#009E73", "#D55E00", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9", "#777777", "#000000"]
STYLES = cycler(color=COLORS, linestyle=[":", "--", "-", *["-."] * 5], marker=[*"s^oDvPX*"])
PUBLISHED_RATES = {"layer3=1e-05", "layer4=0.0001", "fc=0.001"}  # which a label leaves out
# What runs share that are drawn together, and, of these, as one line beside their label.
KIND = ("dataset", "model", "weights", "precision", "split")
SIZES = ("train_images", "image_size", "batch_size")
NUMBERS = (*SIZES, "epochs", "seed", "test_images")
LARGEST_MATRIX = 20  # classes whose counts are legible
# Chinese, Japanese and Korean letters come from the first of these that is installed and has them.
FONTS = ["Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "PingFang SC", "Yu Gothic"]
FONTS += ["Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS"]
STUDY = Path(__file__).parent / "study/results/h100"


def read(folder: Path) -> list[dict]:
    """The summary's rows in the order to draw them, each with the style of its line."""
    runs, file = [], folder / "summary.csv"
    try:
        for row in read_csv(file):
            file = folder / row["run"] / "history.csv"
            runs.append(parsed(row, read_csv(file)))
    except (KeyError, ValueError, TypeError, IndexError, OSError) as error:
        wrong = f"{file} is not what train.py and compare.py write ({error!r})"
        makes = f"python compare.py {folder}/*/epoch*.pt --csv {folder}/summary.csv"
        raise UserError(f"{wrong}; the summary is written by {makes}") from error
    labels = [*STRATEGIES, *sorted({run["label"] for run in runs}.difference(STRATEGIES))]
    styles = dict(zip(labels, itertools.cycle(STYLES)))
    for run in runs:
        run["style"] = styles[run["label"]]
    runs.sort(key=lambda run: (labels.index(run["label"]), run["epochs"], *map(run.get, SIZES)))
    return runs


def parsed(row: dict[str, str], lines: list[dict]) -> dict:
    """A row of summary.csv with a label and its history, an array a column; numbers as numbers."""
    run = row | {name: int(row[name]) for name in NUMBERS}
    run["test_accuracy"] = float(row["test_accuracy"])
    if len(lines) < run["epochs"]:
        raise ValueError(f"{len(lines)} epochs where the summary has {run['epochs']}")
    run["history"] = {}
    for name in lines[0]:  # blank where there was no such number
        numbers = [float(line[name] or "nan") for line in lines[: run["epochs"]]]
        run["history"][name] = np.array(numbers)
    run["split"] = "val" if "val_loss" in run["history"] else "test"
    # What a run's line is called: its strategy, and what is not as published.
    strategy = row["strategy"].replace("fc+stem+layer1+layer2+layer3+layer4", "everything")
    label = f"{strategy} {row.get('tag', '')}".strip()
    if row["frozen_batchnorm"] == "train":
        label += ", usual mistake"
    if others := [rate for rate in row["learning_rates"].split() if rate not in PUBLISHED_RATES]:
        label += f" ({' '.join(others)})"
    run["label"] = textwrap.fill(label, 44)
    return run


def read_csv(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8-sig") as opened:
        return list(csv.DictReader(opened))


def by(runs: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Groups of runs that agree in `keys`."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return groups


def curves(runs: list[dict], title: str) -> "pyplot.Figure":
    """Loss and accuracy by epoch in the longest runs: the seeds' mean, their range as a band."""
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    longest = {label: group for (label, _), group in by(runs, "label", "epochs").items()}
    split = runs[0]["split"]
    columns = ("train_loss", f"{split}_loss", "train_accuracy", f"{split}_accuracy")
    for axis, column in zip(axes.flat, columns):
        for label, group in longest.items():
            values = np.array([run["history"][column] for run in group])
            epoch, style = group[0]["history"]["epoch"], group[0]["style"]
            name = f"{label} ({len(group)} seeds)".replace("(1 seeds)", "(1 seed)")
            every = len(epoch) // 10 or 1
            axis.plot(epoch, values.mean(0), label=name, markersize=4, markevery=every, **style)
            band = {"color": style["color"], "alpha": 0.25, "linewidth": 0}
            axis.fill_between(epoch, values.min(0), values.max(0), **band)
        axis.set(xlabel="epoch", ylabel=column.replace("_", " ").replace("loss", "loss (nats)"))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if "accuracy" in column:
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes[0, 0].set_yscale("log")
    figure.suptitle(title, fontsize="medium")
    handles = axes[0, 0].get_legend_handles_labels()
    wide = 3 if len(longest) <= 3 else 2
    figure.legend(*handles, loc="outside lower center", ncols=wide, frameon=False)
    return figure


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
    axis.set(xlabel="test accuracy", ylim=(len(groups) - 0.4, -0.6))
    axis.set_title(title, fontsize="medium")
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
    if not (rows := read_csv(file)):
        return None
    no_frame = {"frame_on": False, "xticks": [], "yticks": []}
    figure, axes = pyplot.subplots(2, 6, figsize=(12, 5), layout="constrained", subplot_kw=no_frame)
    for axis, row in zip(axes.flat, rows):
        axis.imshow(pyplot.imread(file.parent / row["file"]))
        said = f"said {row['said']} ({float(row['probability']):.0%})\nis {row['true']}"
        axis.set_title(said, fontsize=9)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=STUDY)
    folder = parser.parse_args(argv).folder.expanduser()
    runs = read(folder)
    drawings = dict.fromkeys(sorted(folder.glob("*/*.confusion.csv")), confusion)
    drawings |= dict.fromkeys(sorted(folder.glob("*/*.mistakes/mistakes.csv")), mistakes)
    installed = [name for name in FONTS if name in font_manager.get_font_names()]
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *installed]
    differ = [name for name in KIND if len(by(runs, name)) > 1]
    for kind in by(runs, *KIND).values():
        prefix = "".join(f"{kind[0][name]}-" for name in differ)
        sizes = by(kind, *SIZES)
        largest = sizes[max(sizes)]
        title = f"{largest[0]['train_images']:,} training images, {largest[0]['image_size']} pixels"
        save(folder / f"{prefix}curves.png", curves, largest, title)
        save(folder / f"{prefix}table.png", table, largest, title)
        if len(largest) < len(kind):
            print(f"not drawn: {len(kind) - len(largest)} runs on fewer or smaller images")
    for file, draw in drawings.items():
        save(file.with_suffix(".png"), draw, file)


def save(file: Path, draw: Callable, *what) -> None:
    """Draws it if there is something to draw; the picture appears whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    try:
        if figure := draw(*what):
            figure.savefig(part, format="png", dpi=120)
            part.replace(file)
            print(file)
    except (KeyError, ValueError, IndexError, OSError, SyntaxError) as error:  # the last: no PNG
        raise UserError(f"cannot draw {file} ({error!r})") from error
    finally:
        part.unlink(missing_ok=True)
        pyplot.close("all")


if __name__ == "__main__":
    command(main, when_stopped="the pictures drawn so far are whole", when_full="draw fewer runs")
