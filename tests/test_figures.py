"""Every figure of the study stands in a committed CSV file or log."""

import re
from pathlib import Path
from statistics import median

import pytest
from conftest import ROOT, rows

STRATEGIES = ("fc", "fc+layer4", "fc+layer3+layer4")
RESULTS = ROOT / "study/results"


def pages(folder: Path) -> list[str]:
    """A README in both languages, with English commas."""
    texts = [folder / name for name in ("README.md", "README.ja.md")]
    return [file.read_text(encoding="utf-8").replace("、", ", ") for file in texts]


PAGES, STUDY = pages(ROOT), pages(ROOT / "study")


def accuracies(folder: str, strategy: str, **settings) -> list[float]:
    """In percent, of the runs with these settings."""
    asked = {"strategy": strategy, "image_size": 224, "train_images": 40_000} | settings
    found = []
    for row in rows(RESULTS / folder / "summary.csv"):
        if all(row[name] == str(value) for name, value in asked.items()):
            found.append(100 * float(row["test_accuracy"]))
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_tables_of_strategies(strategy):
    short, long = ["", ""], ["", ""]
    for i, epochs in enumerate((10, 50)):
        found = sorted(sum((accuracies(f, strategy, epochs=epochs) for f in ("h100", "h200")), []))
        shown = [found[0], median(found), found[-1]] if len(found) > 1 else found
        short[i] = ", ".join(f"{value:.1f}" for value in shown) + "%"
        long[i] = ", ".join(f"{value:.2f}" for value in shown) + "%"
    for page in PAGES:
        assert f"| {strategy} | {short[0]} | {short[1]} |" in page
    for page in STUDY:
        assert f"| {strategy} | {long[0]} | {long[1]} |" in page


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_tables_of_sizes(strategy):
    pixels, images = [], []
    for size in (32, 64, 112, 160, 224):
        pixels += accuracies("h100", strategy, epochs=10, image_size=size, train_images=5000)
    machine = "epyc" if strategy == "fc" else "h100"
    for count in (500, 1000, 2500, 5000, 10_000, 40_000):
        found = accuracies(machine, strategy, epochs=10, train_images=count)
        seeds = found if machine == "epyc" else found[:1]
        images.append(sum(seeds) / len(seeds))
    for page in STUDY:
        for values in (pixels, images):
            assert " | ".join(f"{value:.2f}" for value in values) in page


def test_the_differences_and_their_errors():
    known = {"±"}
    for file in RESULTS.glob("*/paired.csv"):
        for row in rows(file):
            points, error = 100 * float(row["difference"]), 100 * float(row["standard_error"])
            known |= {f"{sign * points:+.2f} ± {error:.2f}" for sign in (1, -1)}
    for file in RESULTS.glob("*/*.csv"):
        for row in rows(file) if file.name == "advice.csv" else ():
            known.add(f"{float(row['points']):+.2f} ± {float(row['error']):.2f}")
    logs = "\n".join(file.read_text(encoding="utf-8") for file in RESULTS.glob("*/*.txt"))
    for page in STUDY:
        for figure in re.findall(r"[+-]\d\.\d\d ± \d\.\d\d", page):
            assert figure in known or figure in logs, figure


@pytest.mark.parametrize("machine", ["h100", "xeon", "epyc"])
def test_how_many_times_as_fast_the_four_runs_are(machine):
    usual = ours = 0.0
    for row in rows(RESULTS / machine / "benchmark.csv"):
        if row["strategy"] != "fc" and row["variant"] == "textbook":
            usual += float(row["projected_10_epochs"]) + float(row["projected_50_epochs"])
        if row["strategy"] != "fc" and row["variant"] == "ours":
            ours += float(row["projected_50_epochs"])
    times = f"{usual / ours:.1f}" if usual / ours < 30 else f"{usual / ours:.0f}"
    for page in STUDY:
        assert f"| {ours:,.0f} " in page and f"**{times} " in page
