"""Draw a folder of runs: pictures from the CSV files alone.

    python plot.py                # results/study, the runs of the README
    python plot.py results        # your own

Reads summary.csv (evaluate.py --csv), every run's history.csv and, where
evaluate.py --per-class has written them, confusion.csv and mistakes.csv.
Needs matplotlib: pip install -r requirements-plot.txt
"""

import argparse
import base64
import csv
import io
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

try:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
except ImportError:
    print("plot.py: error: drawing needs matplotlib: pip install -r requirements-plot.txt", file=sys.stderr)
    sys.exit(2)

# Colours that the colour-blind can tell apart (Okabe and Ito 2008); lines and markers that a black and white print can.
STYLES = {"fc": dict(color="#009E73", linestyle=":", marker="s"), "fc + layer4": dict(color="#D55E00", linestyle="--", marker="^"),
          "fc + layer3 + layer4": dict(color="#0072B2", linestyle="-", marker="o")}
OTHERS = [dict(color=color, linestyle="-.", marker=marker) for color, marker in (("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#777777", "X"))]
RATES = {"stem=1e-08", "layer1=1e-07", "layer2=1e-06", "layer3=1e-05", "layer4=0.0001", "fc=0.001"}  # which go without saying
PUBLISHED = {("fc + layer4", 10): 0.9133, ("fc + layer3 + layer4", 10): 0.9230,
             ("fc + layer4", 50): 0.9201, ("fc + layer3 + layer4", 50): 0.9335}
FULL_SIZE = 40_000  # CIFAR-10 images from which a run may stand beside those figures, which are of 50,000


def read(folder: Path) -> list[dict]:
    """The summary's rows in the order to draw them, numbers as numbers, with a label and the history, a
    dictionary of columns. Raises OSError or ValueError with a sentence for the user."""
    summary = folder / "summary.csv"
    if not summary.exists():
        raise FileNotFoundError(f"no {summary}: python evaluate.py {folder}/*/checkpoint.pt --csv {summary} writes it")
    runs, file = [], None
    try:
        for row in read_csv(summary):
            file = folder / row["run"] / "history.csv"
            lines = read_csv(file)
            strategy = " + ".join(["fc", *row["unfrozen"].split("+")[:-1]])
            strategy += ", usual mistake" if row["frozen_batchnorm"] == "train" else ""
            others = [rate for rate in row["learning_rates"].split() if rate not in RATES]
            label = strategy + (f" ({' '.join(others)})" if others else "")
            runs.append(row | {name: int(row[name]) for name in ("epochs", "seed", "train_images", "test_images")} | {
                "strategy": strategy, "label": label, "test_accuracy": float(row["test_accuracy"]),
                "history": {name: np.array([float(line[name]) for line in lines]) for name in lines[0]}})
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{file or summary} or {summary} is not what train.py and evaluate.py write ({error!r})") from error
    styles = STYLES | dict(zip(sorted({run["label"] for run in runs} - STYLES.keys()), itertools.cycle(OTHERS)))
    order = list(styles)
    return sorted((run | {"style": styles[run["label"]]} for run in runs),
                  key=lambda run: (order.index(run["label"]), run["epochs"], run["train_images"], run["seed"]))


def read_csv(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def by(runs: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Groups of runs that agree in `keys`."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return groups


def curves(runs: list[dict]) -> pyplot.Figure:
    """Loss and accuracy by epoch in the longest runs: the mean over the seeds, their spread as a band."""
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    longest = {label: group for (label, _), group in by(runs, "label", "epochs").items()}
    for axis, column in zip(axes.flat, ("train_loss", "test_loss", "train_accuracy", "test_accuracy")):
        for label, group in longest.items():
            values, style = np.array([run["history"][column] for run in group]), group[0]["style"]
            epoch = group[0]["history"]["epoch"]
            seeds = f"{len(group)} seeds" if len(group) > 1 else "1 seed"
            axis.plot(epoch, values.mean(0), label=f"{label} ({seeds})", markersize=4, markevery=len(epoch) // 10 or 1, **style)
            axis.fill_between(epoch, values.min(0), values.max(0), color=style["color"], alpha=0.25, linewidth=0)
        axis.set(xlabel="epoch", ylabel=column.replace("_", " ") + (" (nats)" if "loss" in column else ""))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if "accuracy" in column:
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes[0, 0].set_yscale("log")
    figure.suptitle(f"{runs[0]['train_images']:,} training images", fontsize="medium")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3 if len(longest) <= 3 else 2, frameon=False)
    return figure


def table(runs: list[dict]) -> pyplot.Figure:
    """The accuracy after the last epoch beside the published one."""
    groups = by(runs, "label", "epochs")
    published = PUBLISHED if runs[0]["train_images"] >= FULL_SIZE and runs[0]["run"].startswith("cifar10-") else {}
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.45 * len(groups)), layout="constrained")
    for height, ((label, epochs), group) in enumerate(groups.items()):
        accuracies = np.array([run["test_accuracy"] for run in group])
        error = np.sqrt(accuracies.mean() * (1 - accuracies.mean()) / group[0]["test_images"])
        axis.errorbar(accuracies.mean(), height, xerr=error, capsize=4, **group[0]["style"] | {"linestyle": "none"})
        axis.plot(accuracies, [height] * len(group), "|", color="black", markersize=12)
        axis.plot(published.get((label, epochs), np.nan), height, "x", color="black", markersize=9)
    for style, meaning in (("k|", "a seed"), ("ko", "their mean, ± the test set's standard error"), ("kx", "published"))[:3 if published else 2]:
        axis.plot([], [], style, label=meaning)
    axis.set_yticks(range(len(groups)), [f"{label}, {epochs} epochs" for label, epochs in groups])
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.set_title(f"{runs[0]['train_images']:,} training images", fontsize="medium")
    axis.set(xlabel="test accuracy")
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def sizes(runs: list[dict]) -> pyplot.Figure | None:
    """Accuracy by the number of training images, in the runs of that length of which there are most kinds."""
    runs = max(by(runs, "epochs").values(), key=lambda group: (len(by(group, "label", "train_images")), -group[0]["epochs"]))
    ticks = sorted({run["train_images"] for run in runs})
    if len(ticks) == 1:
        return None
    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for (label, epochs), group in by(runs, "label", "epochs").items():
        points = by(group, "train_images")
        accuracies = [[run["test_accuracy"] for run in seeds] for seeds in points.values()]
        mean = np.array([np.mean(values) for values in accuracies])
        spread = mean - [min(values) for values in accuracies], [max(values) for values in accuracies] - mean
        axis.errorbar([size for (size,) in points], mean, yerr=spread, capsize=3, label=f"{label}, {epochs} epochs", **group[0]["style"])
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{size:,}" for size in ticks])
    axis.minorticks_off()
    axis.set(xlabel="training images", ylabel="test accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axis.legend()
    return figure


def drift(runs: list[dict]) -> pyplot.Figure | None:
    """How far the weights have moved from the pretrained ones, by epoch: a line per stage and rate, of the
    longest run on most images."""
    lines = {}
    for run in sorted(runs, key=lambda run: (run["train_images"], run["epochs"], -run["seed"])):
        rates = dict(part.split("=") for part in run["learning_rates"].split())
        for column in (column for column in run["history"] if column.endswith("_drift")):
            stage = column.removesuffix("_drift")
            lines[stage, float(rates[stage]), run["strategy"]] = run, column
    if not lines:
        return None
    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for number, ((stage, rate, strategy), (run, column)) in enumerate(sorted(lines.items(), key=lambda line: line[0])):
        axis.plot(run["history"]["epoch"], run["history"][column], color=f"C{number}", markersize=5, marker="os^vD*XP"[number % 8],
                  linestyle=("-", "--", ":", "-.")[number % 4], markevery=run["epochs"] // 10 or 1,
                  label=f"{stage} at {rate:g}, with {strategy}, {run['train_images']:,} images")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda distance, _: f"{100 * distance:g}%")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.set(xlabel="epoch", ylabel="‖weights − pretrained‖ / ‖pretrained‖")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def confusion(file: Path) -> pyplot.Figure:
    """Which class is taken for which: a row per true class, the counts of the test set."""
    (_, *said), *rows = list(csv.reader(io.StringIO(file.read_text(encoding="utf-8"), newline="")))
    counts = np.array([[int(count) for count in row[1:]] for row in rows]).reshape(len(said), len(said))
    figure, axis = pyplot.subplots(figsize=(1.5 + 0.6 * len(said), 1.5 + 0.6 * len(said)), layout="constrained")
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    axis.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts if len(said) <= 20 else counts[:0]):
        axis.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8, color="white" if shares[row, column] > 0.5 else "black")
    axis.set_xticks(range(len(said)), said, rotation=45, ha="right")
    axis.set_yticks(range(len(said)), said)
    axis.set(xlabel="said", ylabel="true")
    return figure


def mistakes(file: Path) -> pyplot.Figure | None:
    """The wrong answers given with most confidence, as evaluate.py --per-class kept them."""
    rows = read_csv(file)
    figure, axes = pyplot.subplots(2, 6, figsize=(12, 5), layout="constrained")
    for axis, row in zip(axes.flat, rows):
        axis.imshow(pyplot.imread(io.BytesIO(base64.b64decode(row["png"])), format="png"))
        axis.set_title(f"said {row['said']} ({float(row['probability']):.0%})\nis {row['true']}", fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    return figure if rows else None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/study"), help="default: results/study")
    folder = parser.parse_args(argv).folder
    try:
        datasets = by(read(folder), "dataset")
        for (dataset,), runs in datasets.items():
            prefix = f"{dataset}-" if len(datasets) > 1 else ""
            by_size = {size: group for (size,), group in by(runs, "train_images").items()}
            for size, group in by_size.items():
                suffix = "" if size == max(by_size) else f"-{size}"
                if not suffix or len(by(group, "label")) > 1:  # of the smaller ones, those that compare something
                    for draw in (curves, table):
                        save(draw, group, folder / f"{prefix}{draw.__name__}{suffix}.png")
            for draw in (sizes, drift):
                save(draw, runs, folder / f"{prefix}{draw.__name__}.png")
        for draw in (confusion, mistakes):
            for file in sorted(folder.glob(f"*/{draw.__name__}.csv")):
                save(draw, file, file.with_suffix(".png"))
    except (OSError, ValueError) as error:
        parser.error(str(error))


def save(draw: Callable, what: list[dict] | Path, file: Path) -> None:
    """Draws it if there is something to draw; the picture appears whole or not at all."""
    try:
        figure = draw(what)
    except (KeyError, ValueError, IndexError, SyntaxError) as error:  # SyntaxError: Pillow's word for no PNG
        raise ValueError(f"{what if isinstance(what, Path) else file.parent} holds nothing to draw {file.name} from ({error!r})") from error
    if figure:
        part = file.with_name(f".{file.name}.part")
        figure.savefig(part, format="png", dpi=120)
        part.replace(file)
        print(file)
    pyplot.close("all")


if __name__ == "__main__":
    main()
