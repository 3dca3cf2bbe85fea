"""How many points each change of the recipe gave over the published one, from CSV files alone.

    python compare.py results/advice/*/epoch10.pt --csv results/advice/summary.csv \\
        --paired results/advice/paired.csv
    python -m study.advice.table results/advice

The error of two single runs counts the choice of test pictures, and how far both runs wander over
their last epochs (plumbing/verdict.py). Seconds are the median of the run's epochs.
"""

import statistics
from pathlib import Path

import plot
from plumbing.cli import Parser, command
from plumbing.verdict import likelihood, over_epochs, wander


def history(folder: Path, run: str) -> list[dict[str, float]]:
    lines = plot.read_csv(folder / run / "history.csv")
    return [{name: float(line[name] or "nan") for name in line} for line in lines]


def row(folder: Path, run: str, published: str, difference: float, of_images: float) -> str:
    """One run against the published recipe. difference: of two accuracies; of_images: its standard
    error by the choice of test pictures."""
    one, other = history(folder, run), history(folder, published)
    error, chance = over_epochs(difference, of_images**2, wander(one), wander(other))
    epoch, usual = (statistics.median(line["seconds"] for line in lines) for lines in (one, other))
    points = f"{100 * difference:+.2f} ± {100 * error:.2f}"
    return f"{points} | {likelihood(chance)} | {epoch:.1f} s, {usual:.1f} s"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    runs = {line["run"]: line for line in plot.read_csv(folder / "summary.csv")}
    print("| learns | change | seed | points over the published recipe | | an epoch, and its |")
    print("|---|---|---|---|---|---|")
    for pair in plot.read_csv(folder / "paired.csv"):
        difference, of_images = float(pair["difference"]), float(pair["standard_error"])
        both = (pair["run"], pair["other"], difference), (pair["other"], pair["run"], -difference)
        for name, published, gained in both:
            run, base = runs[name], runs[published]
            same = run["strategy"] == base["strategy"] and run["seed"] == base["seed"]
            if run["tag"] and not base["tag"] and same:
                print(f"| {run['strategy']} | {run['tag']} | {run['seed']} |", end=" ")
                print(row(folder, name, published, gained, of_images), "|")


if __name__ == "__main__":
    command(main, when_stopped="nothing is written", when_full="use another machine")
