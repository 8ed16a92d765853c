"""Intervals against what is known in closed form, and the verdicts at their edges."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlllm.statistics import (
    MIN_ITEMS,
    Change,
    Metric,
    bootstrap,
    compare_hits,
    compare_losses,
    compare_probe,
    format_p,
    format_signed,
    format_value,
    judge_new,
    judge_old,
    mcnemar,
    ratio_error,
)


def change(low: float, high: float, metric: Metric = "loss", items: int = 100) -> Change:
    middle = (low + high) / 2
    return Change(metric, items, before=2.6, after=2.6 + middle, difference=middle, low=low, high=high, noise=0.01)


def losses(values: list[float], tokens: list[int]) -> list[dict]:
    return [{"loss": loss, "tokens": count, "correct": None} for loss, count in zip(values, tokens, strict=True)]


def hits(values: list[int]) -> list[dict]:
    return [{"correct": bool(value), "loss": 1.0, "tokens": 1} for value in values]


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_sum(gained: int, lost: int) -> None:
    count, least = gained + lost, min(gained, lost)
    tail = sum(Fraction(math.comb(count, k), 2**count) for k in range(least + 1))
    assert mcnemar(gained, lost) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == 2 / 32
    assert mcnemar(1, 9) == mcnemar(9, 1) == 2 * (1 + 10) / 1024
    assert mcnemar(3000, 2000) < 1e-40  # no overflow


def test_the_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(0.1, 1.0, 2000)
    error = values.std() / math.sqrt(2000)
    low, high = bootstrap(values, np.ones(2000))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.06 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.06 * error)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_bootstrap_of_a_ratio_agrees_with_the_linearised_error(seed: int) -> None:
    random = np.random.default_rng(seed)
    tokens = random.integers(20, 200, 500).astype(float)
    difference = tokens * random.normal(0.02, 0.1, 500)
    low, high = bootstrap(difference, tokens)
    assert high - low == pytest.approx(2 * 1.96 * ratio_error(difference, tokens), rel=0.08)
    assert low < difference.sum() / tokens.sum() < high


def test_the_bootstrap_finds_95_percent() -> None:
    random = np.random.default_rng(5)
    inside = 0
    for _ in range(100):
        tokens = random.integers(20, 200, 120).astype(float)
        low, high = bootstrap(tokens * random.normal(0.02, 0.1, 120), tokens)
        inside += low <= 0.02 <= high
    assert 88 <= inside <= 100


def test_the_error_of_a_share_is_the_binomial_one() -> None:
    right = np.array([1.0] * 140 + [0.0] * 141)
    assert ratio_error(right, np.ones(281)) == pytest.approx(math.sqrt(0.25 / 281), rel=0.01)
    assert 100 * ratio_error(right, np.ones(281)) == pytest.approx(3.0, abs=0.05)


def test_loss_is_per_token_not_per_item() -> None:
    found = compare_losses(losses([10.0, 300.0], [10, 100]), losses([20.0, 300.0], [10, 100]))
    assert (found.before, found.after) == (310 / 110, 320 / 110)
    assert found.difference == 10 / 110


def test_hits_are_paired() -> None:
    before, after = hits([0] * 20 + [1] * 20), hits([1] * 12 + [0] * 8 + [1] * 18 + [0] * 2)
    found = compare_hits("accuracy", before, after)
    assert (found.gained, found.lost, found.difference) == (12, 2, 0.25)
    assert found.p == mcnemar(12, 2)
    assert found.low < 0.25 < found.high


@pytest.mark.parametrize(
    ("low", "high", "loss_verdict", "accuracy_verdict"),
    [
        (0.0, 0.0, "kept", "kept"),
        (-0.01, 0.02, "kept", "kept"),
        (0.0, 0.02, "kept", "kept"),
        (-0.02, 0.0, "kept", "kept"),
        (0.001, 0.02, "lost", "improved"),
        (-0.02, -0.001, "improved", "lost"),
    ],
)
def test_lost_only_if_the_whole_interval_is_worse(
    low: float, high: float, loss_verdict: str, accuracy_verdict: str
) -> None:
    assert judge_old(change(low, high)) == loss_verdict
    assert judge_old(change(low, high, "accuracy")) == accuracy_verdict
    assert judge_old(change(low, high, items=MIN_ITEMS - 1)) == "unclear"


def test_learned_if_one_measure_is_better_and_none_worse() -> None:
    better, same, worse = change(-1.0, -0.5), change(-0.1, 0.1, "exact_match"), change(-0.3, -0.1, "exact_match")
    assert judge_new([same, better]) == "learned"
    assert judge_new([same]) == "not learned"
    assert judge_new([worse, same]) == "worse"
    assert judge_new([worse, better]) == "mixed"
    assert judge_new([change(-1.0, -0.5, items=3)]) == "unclear"


def test_identical_models_keep_everything() -> None:
    rows = losses([5.0 + i for i in range(40)], [4] * 40)
    found = compare_probe({"title": "Prose", "kind": "text", "role": "old"}, rows, rows)
    assert (found["verdict"], found["detail"], found["low"], found["high"]) == ("kept", "kept: no loss seen", 0.0, 0.0)


def test_the_words_say_how_much() -> None:
    before = losses([260.0] * 40, [100] * 40)
    worse = losses([260.0 + 1.3 + 0.1 * (i % 3 - 1) for i in range(40)], [100] * 40)
    probe = {"title": "Prose", "kind": "text", "role": "old"}
    assert compare_probe(probe, before, worse)["detail"] == "lost 0.013 nats/token (+0.5 %)"
    assert compare_probe(probe, worse, before)["detail"] == "improved 0.013 nats/token (−0.5 %)"
    assert compare_probe(probe | {"role": "drift"}, before, worse)["detail"] == "drifted 0.013 nats/token"
    choice = {"title": "Choice", "kind": "choice", "role": "old"}
    assert compare_probe(choice, hits([1] * 100), hits([1] * 79 + [0] * 21))["detail"] == "lost 21.0 points"


def test_numbers_are_written_for_people() -> None:
    assert (format_value(0.2234, "accuracy"), format_value(0.0, "accuracy"), format_value(1.7424, "loss")) == (
        "22.3 %",
        "0 %",
        "1.742",
    )
    assert (format_signed(-0.0213, "loss"), format_signed(0.00042, "loss"), format_signed(-0.021, "accuracy")) == (
        "−0.021",
        "+0.00042",
        "−2.1 points",
    )
    assert (format_p(0.0312), format_p(1e-9), format_p(1.0)) == ("p = 0.031", "p < 0.001", "p = 1")
