"""Which strategy a set of runs speaks for."""

import math

import numpy as np
import pytest
import torch

from plumbing import verdict as words
from plumbing.verdict import comparable, mcnemar, over_seeds, paired, spreads, student, verdict

PARAMETERS = {"fc": 5, "fc+layer4": 400, "fc+layer3+layer4": 900}
IMAGES = 1000


def right(count: int, start: int = 0) -> torch.Tensor:
    """bool [IMAGES]: so many in a row are right."""
    correct = torch.zeros(IMAGES, dtype=torch.bool)
    correct[start : start + count] = True
    return correct


def run(strategy: str, correct: torch.Tensor, seed=0, epochs=10, rates="", **other):
    """A row of summary.csv and its checkpoint."""
    row = {"strategy": strategy, "learning_rates": rates, "seed": seed, "epochs": epochs}
    row |= {"trainable_parameters": PARAMETERS[strategy], "device": "a card", "dataset": "cats"}
    row |= {"train_images": 2000, "test_images": IMAGES, "seconds": PARAMETERS[strategy] / 10}
    row |= {"image_size": 224, "batch_size": 128, "weights": "imagenet", "tag": "", "code": "a"}
    row["run"] = f"{strategy}-s{seed}"
    row["test_accuracy"] = correct.double().mean().item()
    settings = {"strategy": strategy, "seed": seed, "image_size": 224, "test_data": "a"}
    settings |= {
        "classes": ("a", "b", "c"),
        "learning_rates": rates,
        "initial_network": str(seed),
        "train_data": str(seed),
    }
    history = [{"test_accuracy": row["test_accuracy"]}] * epochs  # it does not wander
    saved = {"settings": settings | other, "test_correct": correct, "history": history}
    return row | other, saved


def said(*runs: tuple[dict, dict]) -> str:
    rows, checkpoints = zip(*runs)
    lines = list(verdict(rows, checkpoints))
    assert all(len(line) <= 80 for text in lines for line in text.split("\n"))
    return " ".join(" ".join(lines).split())


FC, LAYER4 = run("fc", right(800)), run("fc+layer4", right(900))


def test_a_clear_difference():
    assert said(FC, LAYER4) == (
        "verdict 10 epochs on 2,000 pictures of cats, compared on 1,000 others (224 pixels, "
        "batches of 128, weights imagenet); seed 0 "
        "fc+layer4 over fc: +10.00 ± 0.95 points, more than chance (p < 0.001); 40 s instead of 0 "
        "so: fc+layer4, 90.00% right; by guessing 33.33% these are single runs, "
        "and p counts how far they wander from epoch to epoch: "
        'SEEDS="0 1 2" bash run_all.sh tells whether others agree '
        "these test pictures were used to choose: of new ones expect a little less"
    )


def test_a_difference_within_its_error_names_the_cheaper_one():
    text = said(run("fc+layer3+layer4", right(905, 2)), LAYER4, FC)
    assert "fc+layer3+layer4 over fc+layer4: +0.50 ± 0.30 points, which may be chance" in text
    assert "so: fc+layer4, 90.00% right" in text
    assert "fc+layer3+layer4: not clearly better here" in text


@pytest.mark.parametrize(
    "t, freedom, chance",
    [
        *((12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05)),
        *((2.228, 10, 0.05), (63.657, 1, 0.01), (4.604, 4, 0.01), (1.96, 10_000, 0.05)),
        *((0, 7, 1.0), (-2.571, 5, 0.05)),
    ],
)
def test_student_s_distribution_is_that_of_the_tables(t, freedom, chance):
    assert student(t, freedom) == pytest.approx(chance, abs=5e-5)


@pytest.mark.parametrize("wander, discordant", [(0.003, 0.05), (0.003, 0.08), (0.0021, 0.05)])
@pytest.mark.parametrize("epochs", [10, 50])
def test_two_equally_good_strategies_are_seldom_called_different(wander, discordant, epochs):
    """Runs of 11,000 test pictures whose accuracy wanders by 0.3 points, from seed to seed as from
    epoch to epoch. By the choice of pictures alone a quarter of them would differ."""
    random, trials, wrong, wrong_alone = np.random.default_rng(0), 500, 0, 0
    for _ in range(trials):
        means = random.normal(0.92, wander, 2)
        halves = discordant / 2 + (means[0] - means[1]) / 2 * np.array([1, -1])
        only, only_other = random.binomial(11_000, halves.clip(0))
        correct = torch.zeros(2, 11_000, dtype=torch.bool)
        correct[0, :only] = correct[1, only : only + only_other] = True
        both = []
        for mean in means:
            accuracies = random.normal(mean, wander, epochs)
            both.append(words.wander([{"test_accuracy": value} for value in accuracies]))
        wrong += over_seeds([correct[0]], [correct[1]], both)[2] < words.CLEAR
        wrong_alone += over_seeds([correct[0]], [correct[1]])[2] < words.CLEAR
    assert wrong <= 0.07 * trials < 0.2 * trials < wrong_alone


def test_runs_too_short_to_wander_are_called_that():
    text = said(run("fc", right(800), epochs=5), run("fc+layer4", right(900), epochs=5))
    assert "too short to see how far they wander, and p counts the choice of test pictures" in text


def test_seeds_have_a_mean_and_a_spread():
    runs = []
    for seed, count in enumerate((890, 900, 910)):
        one = run("fc+layer4", right(count), seed=seed)
        one[0]["run"] = f"cats-fc+layer4-bf16-s{seed}-n5"
        runs.append(one)
    alone = run("fc", right(800))
    alone[0]["run"] = "cats-fc-bf16-s0-n5"
    rows, checkpoints = zip(*runs, alone)
    (line,) = spreads(rows, checkpoints)
    expected = "90.00% ± 1.00 points, seeds 0 1 2, 10 epochs, cats-fc+layer4-bf16-n5"
    assert line.strip() == expected


def test_each_is_compared_with_the_best_before_it():
    text = said(
        run("fc", right(900)), run("fc+layer4", right(800)), run("fc+layer3+layer4", right(950))
    )
    assert "fc+layer4 over fc: -10.00 ± 0.95 points, more than chance" in text
    assert "fc+layer3+layer4 over fc: +5.00" in text and "so: fc+layer3+layer4, 95.00%" in text
    assert "not clearly better" not in text


def test_the_longest_length_and_the_seeds_that_all_have():
    runs = []
    for name in ("fc", "fc+layer4"):
        for seed in (0, 1, 2):
            runs += [run(name, right(800), seed, 10), run(name, right(800), seed, 50)]
    text = said(*runs, run("fc", right(1), 3, 50), run("fc", right(1), 0, 99))
    assert "verdict 50 epochs" in text and "seed 0, 1, 2" in text and "single" not in text
    partly = [one for one in runs if one[0]["epochs"] == 10 or one[0]["strategy"] == "fc"]
    assert "verdict 10 epochs" in said(*partly)


def test_a_stray_run_is_left_out_and_named():
    stray = run("fc+layer3+layer4", right(1000), epochs=1)
    text = said(FC, LAYER4, stray)
    assert "verdict 10 epochs" in text and "so: fc+layer4, 90.00%" in text
    assert text.endswith("left out: fc+layer3+layer4, without 10 epochs of seed 0")


@pytest.mark.parametrize("setting", ["train_data", "initial_network"])
def test_one_seed_on_other_data_or_weights_is_another_run(setting):
    row, saved = run("fc+layer4", right(900))
    saved["settings"][setting] = "another"
    assert said(FC, (row, saved)) == ""


def test_the_same_stages_at_other_rates_are_another_strategy():
    text = said(
        run("fc+layer4", right(800), rates="fc=1"), run("fc+layer4", right(900), rates="fc=2")
    )
    assert "fc+layer4 at fc=2 over fc+layer4 at fc=1: +10.00" in text


@pytest.mark.parametrize("other", [{"image_size": 112}, {"test_data": "b"}])
def test_what_differs_in_more_is_not_compared(other):
    assert said(FC, run("fc+layer4", right(900), **other)) == ""


def test_no_verdict_without_two_strategies_or_a_length_in_common():
    assert said(FC) == said(FC, run("fc", right(800), epochs=50)) == ""
    assert said(FC, run("fc+layer4", right(900), epochs=50)) == ""
    assert said(FC, run("fc+layer4", right(900), seed=1)) == ""


def test_seconds_of_different_devices_are_not_compared():
    assert "instead of" not in said(FC, run("fc+layer4", right(900), device="another"))


def test_a_paired_difference_and_its_error():
    one = torch.tensor([True] * 9 + [False])
    other = torch.tensor([True] * 5 + [False] * 4 + [True])
    deviation = (one.double() - other.double()).std(correction=0).item()
    expected = (pytest.approx(0.3), pytest.approx(deviation / 10**0.5), 4, 1)
    assert paired(one, other) == expected
    assert paired(one, one) == (0, 0, 0, 0)


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(5, 0) == mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)
    expected = math.erfc(100 / 1900**0.5 / 2**0.5)  # for many images nearly normal
    assert mcnemar(1000, 900) == pytest.approx(expected, rel=0.1)


def test_over_seeds_an_image_counts_by_how_often_it_is_right():
    torch.manual_seed(0)
    ours, theirs = torch.rand(3, 500) < 0.6, torch.rand(3, 500) < 0.5
    each = (ours.double() - theirs.double()).numpy()
    difference, error, chance = over_seeds(list(ours), list(theirs))
    assert difference == pytest.approx(each.mean())
    of_images, of_seeds = each.mean(0).var() / 500, each.mean(1).var(ddof=1) / 3
    assert error == pytest.approx((of_images + of_seeds) ** 0.5)
    assert chance == pytest.approx(math.erfc(difference / error / 2**0.5)) and chance < words.CLEAR
    assert over_seeds(list(ours), list(ours)) == (0, 0, 1)
    assert over_seeds([ours[0]], [theirs[0]])[2] == mcnemar(*paired(ours[0], theirs[0])[2:])


def test_the_simplest_comes_first():
    found, _ = comparable([run("fc+layer3+layer4", right(1)), run("fc", right(1)), LAYER4])
    assert [candidate.name for candidate in found] == ["fc", "fc+layer4", "fc+layer3+layer4"]
