"""Which strategy a set of runs speaks for."""

import itertools
import math

import numpy as np
import pytest
import torch

from plumbing import verdict as words
from plumbing.verdict import difference, mcnemar, spreads, student, verdict, wander

PARAMETERS = {"fc": 5, "fc+layer4": 400, "fc+layer3+layer4": 900}
IMAGES = 1000


def right(count: int, start: int = 0) -> torch.Tensor:
    """bool [IMAGES]: so many in a row are right."""
    correct = torch.zeros(IMAGES, dtype=torch.bool)
    correct[start : start + count] = True
    return correct


def run(strategy: str, correct: torch.Tensor, seed=0, epochs=10, rates="", **other):
    """A row of summary.csv and its checkpoint, of a run that does not wander."""
    settings = {"strategy": strategy, "learning_rates": rates, "seed": seed, "tag": "", "code": "a"}
    settings |= {"image_size": 224, "model": "resnet18", "test_data": "a"}
    settings |= {"initial_network": str(seed), "train_data": str(seed), "classes": ("a", "b", "c")}
    row = settings | {"epochs": epochs, "dataset": "cats", "device": "card", "weights": "imagenet"}
    row |= {"train_images": 2000, "test_images": IMAGES, "batch_size": 128}
    row |= {"trainable_parameters": PARAMETERS[strategy], "seconds": PARAMETERS[strategy] / 10}
    row |= {"test_accuracy": correct.double().mean().item(), "run": f"cats-{strategy}-s{seed}"}
    row |= other
    settings |= {name: other[name] for name in other if name in settings}
    history = [{"test_accuracy": row["test_accuracy"]}] * epochs
    return row, {"settings": settings, "test_correct": correct, "history": history}


def said(*runs: tuple[dict, dict]) -> str:
    text, left_out = verdict(runs)
    assert all(len(line) <= 80 for line in (text + left_out).splitlines())
    return " ".join(f"{text} {left_out}".split())


FC, LAYER4 = run("fc", right(800)), run("fc+layer4", right(900))


def test_a_clear_difference():
    assert said(FC, LAYER4) == (
        "verdict 10 epochs on 2,000 pictures of cats, compared on 1,000 test pictures "
        "(resnet18, 224 pixels, batches of 128, weights imagenet); seed 0 "
        "fc+layer4 over fc: +10.00 ± 0.95 points, more than chance (p < 0.001); 40 s instead of 0 "
        "so: fc+layer4, 90.00% right; by guessing 33.33% these are single runs, "
        "and p counts how far they wander from epoch to epoch: "
        'SEEDS="0 1 2" bash run_all.sh tells whether others agree '
        "these test pictures were used to choose: of new ones expect a little less"
    )


def test_each_is_compared_with_the_best_before_it_and_a_doubtful_one_is_not_taken():
    one = run("fc", right(900)), run("fc+layer4", right(800))
    text = said(*one, run("fc+layer3+layer4", right(950)))
    assert "fc+layer4 over fc: -10.00 ± 0.95 points, more than chance" in text
    assert "fc+layer3+layer4 over fc: +5.00" in text and "so: fc+layer3+layer4, 95.00%" in text
    assert "not clearly better" not in text
    text = said(run("fc+layer3+layer4", right(905, 2)), LAYER4, FC)  # the simplest comes first
    assert "fc+layer4 over fc: +10.00" in text
    assert "fc+layer3+layer4 over fc+layer4: +0.50 ± 0.30 points, which may be chance" in text
    assert "so: fc+layer4, 90.00% right" in text
    assert "fc+layer3+layer4: not clearly better here" in text


def test_what_runs_do_not_tell_is_not_said():
    short = said(run("fc", right(800), epochs=5), run("fc+layer4", right(900), epochs=5))
    assert "p counts the choice of pictures alone, as they are too short" in short
    assert "instead of" not in said(FC, run("fc+layer4", right(900), device="another"))
    assert said(FC) == said(FC, run("fc", right(800), epochs=50)) == ""  # there is one strategy


def test_the_longest_length_and_the_seeds_that_all_have():
    cases = itertools.product(("fc", "fc+layer4"), [right(800)], (0, 1, 2), (10, 50))
    runs = list(itertools.starmap(run, cases))
    text = said(*runs, run("fc", right(1), 3, 50), run("fc", right(1), 0, 99))
    assert "verdict 50 epochs" in text and "seed 0, 1, 2" in text and "single" not in text
    assert "left out: cats-fc-s3 1 of 7 runs: " in text
    partly = [one for one in runs if one[0]["epochs"] == 10 or one[0]["strategy"] == "fc"]
    assert "verdict 10 epochs" in said(*partly)


def test_the_same_stages_at_other_rates_are_another_strategy():
    other = run("fc+layer4", right(900), rates="fc=0.001 layer4=0.01")
    assert "fc+layer4 layer4=0.01 over fc+layer4: +0.00" in said(LAYER4, other)


@pytest.mark.parametrize(
    "reason, other",
    [
        ("model", {"model": "resnet34"}),
        ("image size", {"image_size": 112}),
        ("test data", {"test_data": "b"}),
        ("length", {"epochs": 50}),
        ("seed", {"seed": 1}),
        ("seed", {"train_data": "b"}),
        ("seed", {"initial_network": "b"}),
    ],
)
def test_a_run_that_cannot_be_compared_is_named_with_the_reason(reason, other):
    stray = run("fc+layer3+layer4", right(950), **other)
    text = said(FC, stray)
    assert "points" not in text and "2 of 2 runs: no other strategy has the same" in text
    assert reason in text.split("has the same ")[1].split(", ")


def test_a_stray_run_and_one_of_other_code_do_not_keep_the_others_from_being_compared():
    stray = run("fc+layer3+layer4", right(950), epochs=50)
    edited = run("fc", right(950), seed=1, code="b")
    text = said(edited, FC, LAYER4, run("fc", right(800), seed=2), stray)
    assert "seed 0 fc+layer4 over fc: +10.00" in text and "so: fc+layer4, 90.00%" in text
    left_out = "left out: cats-fc-s1, cats-fc-s2, cats-fc+layer3+layer4-s0 3 of 5 runs: "
    assert f"{left_out}no other strategy has the same code, length, seed" in text


def test_student_s_distribution_is_that_of_the_tables():
    table = {(12.706, 1): 0.05, (2.228, 10): 0.05, (1.96, 10_000): 0.05, (-2.571, 5): 0.05}
    table |= {(63.657, 1): 0.01, (4.604, 4): 0.01, (0, 7): 1}
    for (t, freedom), chance in table.items():
        assert student(t, freedom) == pytest.approx(chance, abs=5e-5)


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(5, 0) == mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)
    ways = sum(math.comb(1900, number) for number in range(901))
    assert mcnemar(1000, 900) == pytest.approx(2 * ways / 2**1900)


@pytest.mark.parametrize("case", [(0.003, 0.05, 10), (0.003, 0.08, 50), (0.0021, 0.05, 10)])
def test_two_equally_good_strategies_are_seldom_called_different(case):
    """Runs of 11,000 test pictures whose accuracy wanders by 0.3 points, from seed to seed as from
    epoch to epoch. By the choice of pictures alone a quarter of them would differ."""
    wandering, discordant, epochs = case
    random, trials, wrong, wrong_alone = np.random.default_rng(0), 300, 0, 0
    for _ in range(trials):
        means = random.normal(0.92, wandering, 2)
        halves = discordant / 2 + (means[0] - means[1]) / 2 * np.array([1, -1])
        only, only_other = random.binomial(11_000, halves.clip(0))
        correct = torch.zeros(2, 1, 11_000, dtype=torch.bool)
        correct[0, 0, :only] = correct[1, 0, only : only + only_other] = True
        both = []
        for mean in means:
            accuracies = random.normal(mean, wandering, epochs)
            both.append(wander([{"test_accuracy": value} for value in accuracies], "test"))
        wrong += difference(*correct, both)[2] < words.CLEAR
        wrong_alone += difference(*correct)[2] < words.CLEAR
    assert wrong <= 0.07 * trials < 0.2 * trials < wrong_alone


def test_of_single_runs_the_error_is_the_deviation_of_the_images():
    one = torch.tensor([[True] * 9 + [False]])
    other = torch.tensor([[True] * 5 + [False] * 4 + [True]])
    deviation = (one.double() - other.double()).std(correction=0).item()
    found = difference(one, other)
    assert found == (pytest.approx(0.3), pytest.approx(deviation / 10**0.5), mcnemar(4, 1))
    assert difference(one, one) == (0, 0, 1)


def test_over_seeds_an_image_counts_by_how_often_it_is_right():
    torch.manual_seed(0)
    ours, theirs = torch.rand(3, 500) < 0.6, torch.rand(3, 500) < 0.5
    each = (ours.double() - theirs.double()).numpy()
    more, error, chance = difference(ours, theirs)
    assert more == pytest.approx(each.mean())
    of_images, of_seeds = each.mean(0).var() / 500, each.mean(1).var(ddof=1) / 3
    assert error == pytest.approx((of_images + of_seeds) ** 0.5)
    assert chance == pytest.approx(math.erfc(more / error / 2**0.5)) and chance < words.CLEAR
    assert difference(ours, ours) == (0, 0, 1)


def test_seeds_have_a_mean_and_a_spread():
    runs = [run("fc", right(800), run="cats-fc-bf16-s0-n5")]
    for seed, count in enumerate((890, 900, 910)):
        runs.append(run("fc+layer4", right(count), seed, run=f"cats-fc+layer4-s{seed}-n5"))
    (line,) = spreads(runs)
    assert line.strip() == "90.00% ± 1.00 points, seeds 0 1 2, 10 epochs, cats-fc+layer4-n5"
