"""How many points each change of the recipe gave over the published one.

    python -m study.advice.table results/advice/*/epoch10.pt --csv advice.csv

The error counts the choice of test pictures, and how far both runs wander over their last epochs
(plumbing/verdict.py). The seconds are the training time of a run's fastest epoch, beside that of
the published recipe.
"""

from data import UserError
from plumbing.cli import Parser, command, paths
from plumbing.files import writable, write_rows
from plumbing.verdict import difference, likelihood, wander
from plumbing.weights import read_checkpoint


def key(checkpoint: dict) -> tuple[str, int, str]:
    settings = checkpoint["settings"]
    return settings["strategy"], settings["seed"], settings["tag"]


def compared(run: dict, published: dict) -> dict:
    """A row of the table, of two checkpoints that differ in the tag and what it stands for."""
    correct, usual = (saved["test_correct"][None] for saved in (run, published))
    wanders = wander(run["history"], "test"), wander(published["history"], "test")
    more, error, chance = difference(correct, usual, wanders)
    row = {name: run["settings"][name] for name in ("strategy", "tag", "seed")}
    row |= {"accuracy": run["history"][-1]["test_accuracy"]}
    row |= {"points": 100 * more, "error": 100 * error, "chance": chance}
    for name, saved in {"seconds": run, "published_seconds": published}.items():
        row[name] = min(epoch["train_seconds"] for epoch in saved["history"])
    return row


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--csv", type=writable, default="advice.csv", metavar="FILE")
    args = parser.parse_args(argv)
    runs = [(key(saved), saved) for saved in map(read_checkpoint, paths(args.checkpoints))]
    published = {(strategy, seed): saved for (strategy, seed, tag), saved in runs if not tag}
    rows = []
    for (strategy, seed, tag), saved in runs:
        if not tag:
            continue
        if (strategy, seed) not in published:
            raise UserError(f"{strategy} {tag}, seed {seed}: its run without a tag is missing")
        rows.append(compared(saved, published[strategy, seed]))
    print("| learns | change | seed | points over the published recipe | an epoch |")
    print("|---|---|---|---|---|")
    for row in rows:
        points = f"{row['points']:+.2f} ± {row['error']:.2f}, {likelihood(row['chance'])}"
        seconds = f"{row['seconds']:.1f} s instead of {row['published_seconds']:.1f}"
        print(f"| {row['strategy']} | {row['tag']} | {row['seed']} | {points} | {seconds} |")
    write_rows(args.csv, rows)


if __name__ == "__main__":
    command(main, when_stopped="nothing is written", when_full="compare fewer runs")
