"""The study's own pictures of a folder of runs, from the CSV files alone.

    python -m study.pictures study/results/h100

sizes.png and pixels.png: accuracy by the number of training images and by their size. drift.png:
how far the weights have moved, where history.csv has it (runs of before 2026-12). seconds.png:
accuracy by the time, ours and the textbook script's, where there is a benchmark.csv.
"""

from pathlib import Path

import numpy as np
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

import plot
from plumbing.cli import Parser, command


def sweep(runs: list[dict], column: str, name: str) -> "pyplot.Figure | None":
    """Accuracy by a number that was varied, in the largest group of otherwise equal runs."""
    groups = plot.by(runs, "epochs", *(size for size in plot.SIZES if size != column)).values()
    groups = sorted(groups, key=lambda group: group[0]["epochs"])  # of equal ones the shorter runs
    runs = max(groups, key=lambda group: len(plot.by(group, "label", column)))
    ticks = sorted({run[column] for run in runs})
    if len(ticks) == 1:
        return None
    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for (label, epochs), group in plot.by(runs, "label", "epochs").items():
        points = []
        for (place,), some in plot.by(group, column).items():
            seeds = [run["test_accuracy"] for run in some]
            points.append((place, np.mean(seeds), min(seeds), max(seeds)))
        x, mean, low, high = np.array(sorted(points)).T
        style = group[0]["style"] | {"label": f"{label}, {epochs} epochs", "capsize": 3}
        axis.errorbar(x, mean, yerr=(mean - low, high - mean), **style)
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel=name, ylabel="test accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axis.legend()
    return figure


def drift(runs: list[dict]) -> "pyplot.Figure | None":
    """How far the weights have moved from the pretrained ones, by epoch: a line per stage and
    rate, of the longest run on most and largest images."""
    lines = {}
    order = (*plot.SIZES, "epochs")
    for run in sorted(runs, key=lambda run: (*map(run.get, order), -run["seed"])):
        rates = dict(part.split("=") for part in run["learning_rates"].split())
        for stage in rates:
            if f"{stage}_drift" in run["history"]:
                lines[stage, float(rates[stage]), run["label"].split(" (")[0]] = run
    if not lines:
        return None
    figure, axis = pyplot.subplots(figsize=(9, 5 + 0.2 * len(lines)), layout="constrained")
    for number, ((stage, rate, label), run) in enumerate(sorted(lines.items())):
        style = {"color": f"C{number}", "marker": "os^vD*XP"[number % 8], "markersize": 5}
        style |= {"linestyle": ("-", "--", ":", "-.")[number % 4]}
        style |= {"markevery": run["epochs"] // 10 or 1}
        text = f"{stage} at {rate:g}, {label}, {run['train_images']:,} images"
        axis.plot(run["history"]["epoch"], run["history"][f"{stage}_drift"], label=text, **style)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda distance, _: f"{100 * distance:g}%")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.set(xlabel="epoch", ylabel="‖weights − pretrained‖ / ‖pretrained‖")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def race(runs: list[dict], benchmark: Path) -> "pyplot.Figure | None":
    """Test accuracy by the seconds since the command was typed, for the textbook script and for
    train.py. The accuracies are those of the longest runs of seed 0, because both scripts compute
    the same; the seconds are those that benchmark.csv projects for each."""
    if not benchmark.exists():
        return None
    largest = max(run["train_images"] for run in runs)
    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for row in plot.read_csv(benchmark):
        strategy = f"fc+{row['strategy']}".replace("fc+fc", "fc")  # older files leave out fc
        same = {"label": strategy, "seed": 0, "train_images": largest, "image_size": 224}
        found = [run for run in runs if same.items() <= run.items()]
        if not found or row["variant"] not in ("textbook", "ours"):
            continue
        run = max(found, key=lambda run: run["epochs"])
        short, long = (float(row[f"projected_{epochs}_epochs"]) for epochs in (10, 50))
        epoch = (long - short) / 40
        seconds = short + epoch * (run["history"]["epoch"] - 10)
        style = run["style"] | {"markevery": 7}
        if row["variant"] == "textbook":
            style |= {"markerfacecolor": "white", "linewidth": 1}
        text = f"{strategy}, {row['variant']}"
        axis.plot(seconds, run["history"]["test_accuracy"], label=text, **style)
    if not axis.lines:
        return None
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel="seconds since the command was typed", ylabel="test accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axis.legend()
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    for kind, runs in plot.by(plot.read(folder), *plot.KIND).items():
        print(", ".join(kind))
        plot.save(folder / "sizes.png", sweep, runs, "train_images", "training images")
        plot.save(folder / "pixels.png", sweep, runs, "image_size", "pixels a side")
        plot.save(folder / "drift.png", drift, runs)
        plot.save(folder / "seconds.png", race, runs, folder / "benchmark.csv")


if __name__ == "__main__":
    command(main, when_stopped="the pictures drawn so far are whole", when_full="draw fewer runs")
