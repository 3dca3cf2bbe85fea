"""Which strategy a set of runs speaks for, in words.

From the simplest strategy on, each is compared with the best so far, image by image: on the
validation pictures, if there are any, and on the test pictures otherwise.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from statistics import mean, stdev, variance

import torch

from plumbing.report import figures, split_of
from plumbing.settings import other_rates

SPLITS = {"val": "validation", "test": "test"}
MORE_SEEDS = 'SEEDS="0 1 2" bash run_all.sh tells whether others agree'
CLEAR = 0.05  # a difference that is less probable by chance is called more than chance
STRATEGY = ("trainable_parameters", "strategy", "learning_rates", "tag")  # the simplest comes first
BY_SEED = ("seed", "initial_network", "train_data", "val_data")  # what another seed changes
VARIED = (*STRATEGY, *BY_SEED, "code", "schedule_epochs", "epochs")  # among runs to be compared

Runs = Sequence[tuple[dict, dict]]  # rows of summary.csv, each with its checkpoint
Wander = tuple[float, int] | None  # a variance and its degrees of freedom


def mcnemar(only: int, only_other: int) -> float:
    """How probable it is that two equally good networks differ on images at least so unequally
    (McNemar 1947): the exact binomial test, two-sided."""
    numbers = torch.arange(min(only, only_other) + 1, dtype=torch.float64)
    binomial = torch.distributions.Binomial(only + only_other, torch.tensor(0.5).double())
    return min(1.0, 2 * binomial.log_prob(numbers).exp().sum().item())


def student(t: float, freedom: int) -> float:
    """How probable a value at least so far from 0 is in Student's distribution, to 1e-5: its
    density is proportional to cos(x) ** (freedom - 1) where t = freedom**0.5 * tan(x)."""

    def area(start: float) -> float:
        x = torch.linspace(start, math.pi / 2, 20_001, dtype=torch.float64)
        return torch.trapezoid(x.cos() ** (freedom - 1), x).item()

    return area(math.atan2(abs(t), freedom**0.5)) / area(0)


def wander(history: Sequence[dict], split: str) -> Wander:
    """How far a run wanders from epoch to epoch: the variance of its accuracy over the second half
    of its epochs, the last ten at most; None for under 6 epochs."""
    if len(history) < 6:
        return None
    last = [row[f"{split}_accuracy"] for row in history[-min(len(history) // 2, 10) :]]
    return variance(last), len(last) - 1


def difference(
    correct: torch.Tensor, other: torch.Tensor, wanders: tuple[Wander, Wander] = (None, None)
) -> tuple[float, float, float]:
    """How much more accurate one strategy is than another, the standard error, and how probable
    that is by chance; bool [seeds, N] each. With several seeds an image counts by how often it is
    right, the error is that of the choice of images and of seeds, and the probability is the normal
    distribution's. Of single runs it is McNemar's, and where `wanders` says how far they wander
    also Welch's, with the degrees of freedom of Welch and Satterthwaite."""
    each = correct.double() - other.double()
    more, error = each.mean().item(), each.mean(0).std(correction=0).item() / each.shape[1] ** 0.5
    if len(each) > 1:
        error = math.hypot(error, each.mean(1).std().item() / len(each) ** 0.5)
        chance = math.erfc(abs(more) / error / 2**0.5) if error else 1.0
        return more, error, chance
    chance = mcnemar((each > 0).sum().item(), (each < 0).sum().item())
    if None not in wanders:
        (one, one_freedom), (two, two_freedom) = wanders
        total = error**2 + one + two
        error = total**0.5
        spread = one**2 / one_freedom + two**2 / two_freedom
        freedom = int(min(total**2 / spread, 10_000)) if spread else 10_000
        if error:
            chance = max(chance, student(more / error, freedom))
    return more, error, chance


def alike(runs: Runs, varied: Sequence[str]) -> dict[frozenset, list]:
    """Groups of runs that differ in nothing but what `varied` names, by the settings they share."""
    groups = {}
    for row, saved in runs:
        settings = saved["settings"] | {"epochs": row["epochs"]}
        shared = [(name, repr(settings[name])) for name in settings if name not in varied]
        groups.setdefault(frozenset(shared), []).append((row, saved))
    return groups


class Candidate:
    """The runs of one strategy at one length, in the order of their seeds."""

    def __init__(self, found: dict[tuple, tuple[dict, dict]], seeds: list[tuple]):
        self.rows, checkpoints = zip(*(found[seed] for seed in seeds))
        row, saved = self.rows[0], checkpoints[0]
        others = other_rates(row["learning_rates"])
        self.name = " ".join([row["strategy"], *row["tag"].split(), *others])
        self.split = split_of(row)  # to be chosen on
        self.correct = torch.stack([saved[f"{self.split}_correct"] for saved in checkpoints])
        self.wander = wander(saved["history"], self.split)
        self.guessing = 1 / len(saved["settings"]["classes"])

    def mean(self, column: str) -> float:
        return mean(row[column] for row in self.rows)


def comparable(runs: Runs) -> list[Candidate]:
    """The strategies of a group, the simplest first, at the length that most of them have, the
    longest of these, with the seeds that all of these have. Where runs with one tag, or without,
    are of several codes, the most common one counts."""
    codes = Counter((row["tag"], row["code"]) for row, _ in runs).most_common()
    usual = {tag: code for (tag, code), _ in reversed(codes)}  # the most common one comes last
    lengths = {}
    for row, saved in runs:
        if row["code"] == usual[row["tag"]]:
            strategy = tuple(row[name] for name in STRATEGY)
            begun = saved["settings"]["train_data"], saved["settings"]["initial_network"]
            found = lengths.setdefault(row["epochs"], {}).setdefault(strategy, {})
            found[(row["seed"], *begun)] = row, saved
    strategies = lengths[max(lengths, key=lambda epochs: (len(lengths[epochs]), epochs))]
    shared = set.intersection(*map(set, strategies.values()))
    if not shared:
        return []
    return [Candidate(strategies[strategy], sorted(shared)) for strategy in sorted(strategies)]


def spreads(runs: Runs) -> Iterator[str]:
    """Of each run that was repeated with other seeds: the accuracies' mean and deviation."""
    for group in alike(runs, BY_SEED).values():
        rows = [row for row, _ in group]
        seeds = [str(row["seed"]) for row in rows]
        if len(set(seeds)) > 1:
            accuracies = [figures(row)["accuracy"] for row in rows]
            of_all = f"{mean(accuracies):10.2%} ± {100 * stdev(accuracies):.2f} points"
            run = rows[0]["run"].replace(f"-s{seeds[0]}", "", 1)
            yield f"{of_all}, seeds {' '.join(seeds)}, {rows[0]['epochs']} epochs, {run}"


def verdict(runs: Runs) -> tuple[str, str]:
    """What is said of each group of two strategies or more; and of the runs in none of them."""
    groups = alike(runs, VARIED)
    common = frozenset.intersection(*groups)
    said, compared, reasons = "", set(), ["code", "length", "seed"]
    for settings, group in groups.items():
        candidates = comparable(group)
        if len(candidates) > 1:
            said += paragraph("verdict", sentences(candidates))
            compared |= {row["run"] for candidate in candidates for row in candidate.rows}
        else:
            reasons += sorted(name.replace("_", " ") for name, _ in settings - common)
    names = dict.fromkeys(row["run"] for row, _ in runs)
    left_out = [name for name in names if name not in compared]
    if not left_out or len(names) == 1:
        return said, ""
    why = f"no other strategy has the same {', '.join(dict.fromkeys(reasons))}"
    count = f"{len(left_out)} of {len(names)} runs"
    return said, paragraph("", [f"left out: {', '.join(left_out)}", f"{count}: {why}"])


def paragraph(heading: str, texts: Iterable[str]) -> str:
    """As lines of at most 80 columns, below an empty one."""
    how = {"subsequent_indent": " " * 2, "break_on_hyphens": False}
    lines = "\n".join(textwrap.fill(text, 71, **how) for text in texts)
    return f"\n{heading:9}" + textwrap.indent(f"{lines}\n", " " * 9).removeprefix(" " * 9)


def sentences(candidates: list[Candidate]) -> Iterator[str]:
    """What was compared; each with the best before it; and which one to take."""
    best, *others = candidates
    row, no_better = best.rows[0], []
    seeds = ", ".join(str(row["seed"]) for row in best.rows)
    pictures = f"{best.correct.shape[1]:,} {SPLITS[best.split]} pictures"
    yield (
        f"{row['epochs']} epochs on {row['train_images']:,} pictures of {row['dataset']}, compared "
        f"on {pictures} ({row['model']}, {row['image_size']} pixels, batches of "
        f"{row['batch_size']}, weights {row['weights']}); seed {seeds}"
    )
    for candidate in others:
        wanders = candidate.wander, best.wander
        more, error, chance = difference(candidate.correct, best.correct, wanders)
        text = f"{candidate.name} over {best.name}: {100 * more:+.2f} ± {100 * error:.2f} points, "
        text += likelihood(chance)
        if len({row["device"] for row in candidate.rows + best.rows}) == 1:
            text += f"; {candidate.mean('seconds'):,.0f} s instead of {best.mean('seconds'):,.0f}"
        yield text
        if chance >= CLEAR:
            no_better.append(candidate.name)
        elif more > 0:
            best, no_better = candidate, []
    accuracy = best.mean(f"{best.split}_accuracy")
    yield f"so: {best.name}, {accuracy:.2%} right; by guessing {best.guessing:.2%}"
    if no_better:
        yield f"{' and '.join(no_better)}: not clearly better here"
    if len(best.rows) == 1:
        counts = "how far they wander from epoch to epoch"
        if best.wander is None:
            counts = "the choice of pictures alone, as they are too short to see them wander"
        yield f"these are single runs, and p counts {counts}: {MORE_SEEDS}"
    if best.split == "val":
        tested = f"{row['test_images']:,} test pictures, looked at once"
        yield f"chosen on {pictures}; on {tested}: {best.mean('test_accuracy'):.2%} right"
    else:
        yield "these test pictures were used to choose: of new ones expect a little less"


def likelihood(chance: float) -> str:
    if chance >= CLEAR:
        return f"which may be chance (p = {chance:.2f})"
    if chance >= 0.001:
        return f"more than chance (p = {chance:.3f})"
    return "more than chance (p < 0.001)"
