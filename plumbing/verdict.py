"""Which strategy a set of runs speaks for, in words.

    for line in verdict(rows, checkpoints):
        print(line)

Runs are compared that differ in what learns, in its rates, in the recipe's code if they have a tag
and in the seed, and in nothing else, at one length. From the simplest strategy on, each is compared
with the best so far, image by image: on the validation pictures, if there are any, and on the test
pictures otherwise.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import mean, stdev, variance

import torch

CLEAR = 0.05  # how probable a difference may be by chance, and still be called more than chance
VARIED = ("strategy", "learning_rates", "tag", "code", "schedule_epochs")

SINGLE_RUNS = (
    "these are single runs, and p counts how far they wander from epoch to epoch: "
    'SEEDS="0 1 2" bash run_all.sh tells whether others agree'
)
SHORT_SINGLE_RUNS = (
    "these are single runs, too short to see how far they wander, and p counts the choice of test "
    'pictures alone: SEEDS="0 1 2" bash run_all.sh tells whether others agree'
)
BY_SEED = ("seed", "initial_network", "train_data", "val_data")  # what another seed changes

Runs = Sequence[tuple[dict, dict]]  # rows of summary.csv, each with its checkpoint


def paired(correct: torch.Tensor, other: torch.Tensor) -> tuple[float, float, int, int]:
    """How much more accurate one network is than another on the same images, its standard error,
    and how many images only the one and only the other got right; bool [N] each. The images that
    both get right, or both wrong, say nothing about the difference (McNemar 1947)."""
    only, only_other = (correct & ~other).sum().item(), (other & ~correct).sum().item()
    count = len(correct)
    difference = (only - only_other) / count
    variance = (only + only_other) / count - difference**2
    return difference, (variance / count) ** 0.5, only, only_other


def mcnemar(only: int, only_other: int) -> float:
    """How probable it is that two equally good networks differ on images so unequally in number,
    or more unequally: the exact binomial test, two-sided."""
    count = only + only_other
    at_most = ways = 1  # ways to have so many of `count`, from none on
    for number in range(1, min(only, only_other) + 1):
        ways = ways * (count - number + 1) // number
        at_most += ways
    return min(1.0, 2 * at_most / 2**count)


def wander(history: Sequence[dict], split: str = "test") -> tuple[float, int] | None:
    """How far a run wanders from epoch to epoch: the variance of its accuracy over the second half
    of its epochs, the last ten at most, and its degrees of freedom; None for under 6 epochs."""
    if len(history) < 6:
        return None
    last = [row[f"{split}_accuracy"] for row in history[-min(len(history) // 2, 10) :]]
    return variance(last), len(last) - 1


def over_epochs(
    difference: float, of_images: float, one: tuple[float, int], other: tuple[float, int]
) -> tuple[float, float]:
    """Standard error and probability by chance of a difference between two single runs, from the
    variance of the choice of images and what `wander` says of each run: Welch's test, by Student's
    distribution with the degrees of freedom of Welch and Satterthwaite."""
    total = of_images + one[0] + other[0]
    if total == 0:
        return 0.0, 1.0
    spread = one[0] ** 2 / one[1] + other[0] ** 2 / other[1]
    freedom = int(min(total**2 / spread, 10_000)) if spread else 10_000
    return total**0.5, student(difference / total**0.5, freedom)


def student(t: float, freedom: int) -> float:
    """How probable a value at least so far from 0 is in Student's distribution: the finite series
    of Abramowitz and Stegun 1964, 26.7.3 (odd degrees of freedom) and 26.7.4 (even ones)."""
    angle, odd = math.atan2(abs(t), freedom**0.5), freedom % 2
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = cosine if odd else 1.0, 0.0
    for number in range(odd, freedom, 2):
        total += term
        term *= cosine**2 * (number + 1) / (number + 2)
    inside = sine * total
    if odd:
        inside = 2 / math.pi * (angle + inside)
    return 1 - inside


def over_seeds(
    correct: Sequence[torch.Tensor],
    other: Sequence[torch.Tensor],
    wanders: Sequence[tuple[float, int] | None] = (None, None),
) -> tuple[float, float, float]:
    """Difference, standard error and probability by chance of two strategies, whose runs got right
    what bool [N] says, a seed each. With several seeds an image counts by how often it is right,
    the error is that of the choice of images and of seeds, and the probability is the normal
    distribution's. Of single runs the error is that of the choice of images, and of how far the
    two of them wander from epoch to epoch, where that is known."""
    if len(correct) == 1:
        difference, error, only, only_other = paired(correct[0], other[0])
        chance = mcnemar(only, only_other)
        if None not in wanders:
            error, by_epochs = over_epochs(difference, error**2, *wanders)
            chance = max(chance, by_epochs)
        return difference, error, chance
    each = torch.stack([one.double() - two.double() for one, two in zip(correct, other)])
    of_seeds, of_images = each.mean(1), each.mean(0)
    difference = each.mean().item()
    total = of_images.var(correction=0) / len(of_images) + of_seeds.var() / len(of_seeds)
    error = total.item() ** 0.5
    if error == 0:
        return difference, error, 1.0
    return difference, error, math.erfc(abs(difference) / error / 2**0.5)


class Candidate:
    """The runs of one strategy at one length, in the order of their seeds."""

    def __init__(self, name: str, runs: Runs):
        runs = sorted(runs, key=lambda run: run[0]["seed"])
        self.name, self.row = name, runs[0][0]
        self.split = "val" if "val_correct" in runs[0][1] else "test"  # to be chosen on
        self.guessing = 1 / len(runs[0][1]["settings"]["classes"])
        self.seeds = [row["seed"] for row, _ in runs]
        self.correct = [saved[f"{self.split}_correct"] for _, saved in runs]
        self.wander = wander(runs[0][1]["history"], self.split)
        self.accuracy = mean(row[f"{self.split}_accuracy"] for row, _ in runs)
        self.test_accuracy = mean(row["test_accuracy"] for row, _ in runs)
        self.seconds = mean(row["seconds"] for row, _ in runs)
        self.devices = {row["device"] for row, _ in runs}


def comparable(runs: Runs) -> tuple[list[Candidate], list[str]]:
    """The strategies among runs that differ in nothing else, those with the fewest parameters to
    learn first, at the length that most of them have, the longest of these, with the seeds that
    all of these have; and the names of what is left out: strategies without them, and runs of other
    code than most runs without a tag, or with the same tag, were made by."""
    codes = {}
    for row, _ in runs:
        codes.setdefault(row["tag"], Counter())[row["code"]] += 1
    strategies, without = {}, []
    for row, saved in runs:
        if row["code"] != codes[row["tag"]].most_common(1)[0][0]:
            without.append(f"{row['run']} of other code")
            continue
        key = row["trainable_parameters"], row["strategy"], row["learning_rates"], row["tag"]
        begun = saved["settings"]["train_data"], saved["settings"]["initial_network"]
        found = strategies.setdefault(key, {}).setdefault(row["epochs"], {})
        found[(row["seed"], *begun)] = row, saved
    have = Counter(epochs for lengths in strategies.values() for epochs in lengths)
    epochs = max(have, key=lambda length: (have[length], length))
    there = {key: lengths[epochs] for key, lengths in strategies.items() if epochs in lengths}
    shared = set.intersection(*map(set, there.values()))
    rates = Counter((strategy, tag) for _, strategy, _, tag in strategies)
    candidates = []
    for key in sorted(strategies):
        _, strategy, learning_rates, tag = key
        name = f"{strategy} {tag}".strip()
        if rates[strategy, tag] > 1:
            name = f"{name} at {learning_rates}"
        if key in there and shared:
            candidates.append(Candidate(name, [there[key][one] for one in shared]))
        else:
            seeds = ", ".join(str(seed) for seed, *_ in sorted(shared))
            without.append(f"{name}, without {epochs} epochs of seed {seeds}")
    return candidates, without


def spreads(rows: Sequence[dict], checkpoints: Sequence[dict]) -> Iterator[str]:
    """A line for each run that was repeated with other seeds: the mean of the accuracies and their
    standard deviation."""
    groups = {}
    for row, saved in zip(rows, checkpoints):
        alike = [item for item in saved["settings"].items() if item[0] not in BY_SEED]
        groups.setdefault((repr(alike), row["epochs"]), []).append(row)
    for (_, epochs), group in groups.items():
        if len({row["seed"] for row in group}) > 1:
            split = "val" if "val_accuracy" in group[0] else "test"
            accuracies = [row[f"{split}_accuracy"] for row in group]
            seeds = " ".join(str(row["seed"]) for row in group)
            run = group[0]["run"].replace(f"-s{group[0]['seed']}", "", 1)
            yield (
                f"{mean(accuracies):10.2%} ± {100 * stdev(accuracies):.2f} points, "
                f"seeds {seeds}, {epochs} epochs, {run}"
            )


def verdict(rows: Sequence[dict], checkpoints: Sequence[dict]) -> Iterator[str]:
    """Lines of at most 80 columns; none where no two strategies can be compared."""
    groups = {}
    for row, saved in zip(rows, checkpoints):
        skipped = (*VARIED, *BY_SEED)
        alike = [item for item in saved["settings"].items() if item[0] not in skipped]
        groups.setdefault(repr(sorted(alike)), []).append((row, saved))
    for runs in groups.values():
        candidates, without = comparable(runs)
        if len(candidates) < 2:
            continue
        indent = "\nverdict  "
        left_out = [f"left out: {'; '.join(dict.fromkeys(without))}"] if without else []
        for sentence in [*sentences(candidates), *left_out]:
            yield from textwrap.wrap(
                sentence, 80, initial_indent=indent, subsequent_indent=" " * 11
            )
            indent = " " * 9


def sentences(candidates: Sequence[Candidate]) -> Iterator[str]:
    """What was compared; each with the best before it; and which one to take."""
    best, *others = candidates
    row, validated, no_better = best.row, best.split == "val", []
    seeds, chosen_on = ", ".join(map(str, best.seeds)), len(best.correct[0])
    kind = "validation pictures" if validated else "others"
    yield (
        f"{row['epochs']} epochs on {row['train_images']:,} pictures of {row['dataset']}, compared "
        f"on {chosen_on:,} {kind} ({row['image_size']} pixels, batches of "
        f"{row['batch_size']}, weights {row['weights']}); seed {seeds}"
    )
    for candidate in others:
        wanders = candidate.wander, best.wander
        difference, error, chance = over_seeds(candidate.correct, best.correct, wanders)
        yield (
            f"{candidate.name} over {best.name}: {100 * difference:+.2f} ± {100 * error:.2f} "
            f"points, {likelihood(chance)}{cost(candidate, best)}"
        )
        if chance >= CLEAR:
            no_better.append(candidate.name)
        elif difference > 0:
            best, no_better = candidate, []
    yield f"so: {best.name}, {best.accuracy:.2%} right; by guessing {best.guessing:.2%}"
    if no_better:
        yield f"{' and '.join(no_better)}: not clearly better here"
    if len(best.seeds) == 1:
        yield SINGLE_RUNS if best.wander else SHORT_SINGLE_RUNS
    if validated:
        yield (
            f"chosen on {chosen_on:,} validation pictures; on {row['test_images']:,} test "
            f"pictures, looked at once: {best.test_accuracy:.2%} right"
        )
    else:
        yield "these test pictures were used to choose: of new ones expect a little less"


def likelihood(chance: float) -> str:
    if chance >= CLEAR:
        return f"which may be chance (p = {chance:.2f})"
    if chance >= 0.001:
        return f"more than chance (p = {chance:.3f})"
    return "more than chance (p < 0.001)"


def cost(candidate: Candidate, best: Candidate) -> str:
    """In seconds, where both ran on the same device."""
    if len(candidate.devices | best.devices) > 1:
        return ""
    return f"; {candidate.seconds:,.0f} s instead of {best.seconds:,.0f}"
