"""Tests and intervals against oracles and closed forms, verdicts at their edges."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from controlllm.statistics import (
    MIN_ITEMS,
    bootstrap,
    compare_hits,
    compare_losses,
    compare_scores_of_items,
    decide,
    flip_test,
    format_p,
    format_range,
    format_signed,
    format_value,
    holm,
    judge,
    mcnemar,
    mean_interval,
    ratio_error,
    tango,
)
from controlllm.statistics.size import rounded, to_detect, to_keep

COUNTS = st.integers(0, 60)


def answers(gained: int, lost: int, right: int, wrong: int):
    """Before and after, (items,)."""
    before = np.array([0] * gained + [1] * lost + [1] * right + [0] * wrong)
    return before, np.array([1] * gained + [0] * lost + [1] * right + [0] * wrong)


def judged(change, *, p_adjusted=None, margin=2.0, tests=1):
    return judge(change, p_adjusted=change.p if p_adjusted is None else p_adjusted, margin=margin, tests=tests)


@given(COUNTS, COUNTS)
def test_mcnemar_is_the_binomial_test(gained, lost):
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar([1, 9], [9, 1]) == pytest.approx([2 * 11 / 1024] * 2)
    assert 0 < mcnemar(3000, 2000) < 1e-40


@given(COUNTS, COUNTS)
def test_flips_of_right_answers_are_mcnemars_test(gained, lost):
    assert flip_test(np.array([0.7] * gained + [-0.7] * lost + [0.0] * 5)) == pytest.approx(
        float(mcnemar(gained, lost))
    )


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9))
def test_few_flips_are_all_tried(values):
    observed = abs(sum(values))
    signs = list(itertools.product((-1, 1), repeat=len(values)))
    extreme = sum(abs(sum(s * v for s, v in zip(each, values, strict=True))) >= observed for each in signs)
    assert flip_test(np.array(values, dtype=float)) == pytest.approx(float(Fraction(extreme, len(signs))))


@pytest.mark.parametrize("digits", [1, 9])
def test_many_flips_are_sampled(digits):
    values = np.random.default_rng(1).normal(0.05, 0.5, 400).round(digits)  # of few sizes, and of many
    z = abs(values.sum()) / math.sqrt((values**2).sum())
    assert flip_test(values) == pytest.approx(2 * stats.norm.sf(z), abs=0.01)
    assert flip_test(values) == flip_test(-values)
    assert flip_test(np.abs(values)) == 1e-4


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_its_definition(p):
    adjusted = holm(p)
    for alpha in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[index] * (len(p) - rank) >= alpha:
                break
            rejected.add(index)
        assert rejected == {index for index, value in enumerate(adjusted) if value < alpha}


@settings(max_examples=60)
@given(st.integers(0, 15), st.integers(0, 15), st.integers(0, 15), st.integers(0, 15))
def test_tango_ends_where_the_score_test_rejects(gained, lost, right, wrong):
    count = gained + lost + right + wrong
    if not count:
        return
    low, high = map(float, tango(gained, lost, count))
    assert -1 <= low <= (gained - lost) / count <= high <= 1
    assert tango(lost, gained, count) == (pytest.approx(-high), pytest.approx(-low))
    for end in (end for end in (low, high) if abs(end) < 0.99):
        assert score(end, gained, lost, count) == pytest.approx(1.959964, abs=2e-3)


def score(difference, gained, lost, count):
    """The statistic with the likelihood of the flips maximised by search, under this difference."""

    def unlikely(share):  # of lost
        chances = (share + difference, share, 1 - 2 * share - difference)
        counts = (gained, lost, count - gained - lost)
        return -sum(n * math.log(max(p, 1e-300)) for n, p in zip(counts, chances, strict=True) if n)

    bounds = (max(0.0, -difference), (1 - difference) / 2)
    share = optimize.minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    variance = count * (2 * share + difference - difference**2)
    return abs(gained - lost - count * difference) / math.sqrt(variance)


def test_tango_without_flips_has_a_width():
    z2 = 1.959963984540054**2
    assert tango(0, 0, 50) == (pytest.approx(-z2 / (50 + z2)), pytest.approx(z2 / (50 + z2)))


def test_the_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(3).normal(0.1, 1.0, 2000)
    error = values.std() / math.sqrt(2000)
    low, high = bootstrap(values, np.ones(2000))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.06 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.06 * error)
    assert bootstrap(np.zeros(30), np.ones(30)) == (0.0, 0.0)


def test_the_bootstrap_with_hardly_a_difference_is_students_interval():
    values = np.array([1.0, 1.0] + [0.0] * 28)
    reach = stats.t.ppf(0.975, 29) * ratio_error(values, np.ones(30))
    assert bootstrap(values, np.ones(30)) == (pytest.approx(2 / 30 - reach), pytest.approx(2 / 30 + reach))


def test_the_error_of_a_share_is_the_binomial_one():
    right = np.array([1.0] * 140 + [0.0] * 141)
    assert ratio_error(right, np.ones(281)) == pytest.approx(math.sqrt(0.25 / 281), rel=0.01)


def test_the_interval_of_a_mean_of_equal_normal_ones_is_theirs_by_the_root():
    assert mean_interval([1.0, 3.0], [0.0, 2.0], [2.0, 4.0]) == pytest.approx((2 - 0.5**0.5, 2 + 0.5**0.5))


def test_loss_is_per_token_not_per_item():
    found = compare_losses(np.array([10.0, 300.0]), np.array([20.0, 300.0]), np.array([10, 100]))
    assert (found.before, found.after, found.difference) == (310 / 110, 320 / 110, 10 / 110)
    assert found.improvement[0] == pytest.approx(-100 * (10 / 110) / (310 / 110))


def test_hits_are_paired():
    found = compare_hits("accuracy", *answers(12, 2, 18, 8))
    assert (found.gained, found.lost, found.kept_right, found.kept_wrong) == (12, 2, 18, 8)
    assert found.p == mcnemar(12, 2)
    assert found.effect == {"cohens_g": pytest.approx(12 / 14 - 0.5), "odds_ratio": 6.0}
    assert found.low < found.difference == 0.25 < found.high
    assert compare_hits("pass", *answers(3, 0, 9, 9)).effect["odds_ratio"] is None


def test_a_question_asked_five_times_is_one_question():
    once = compare_hits("accuracy", *(pair := answers(0, 40, 160, 0)))
    again = compare_hits("accuracy", *pair, np.arange(200) // 5)
    assert (again.clusters, again.items, again.difference) == (40, 200, once.difference)
    assert again.high - again.low > 1.8 * (once.high - once.low)
    assert again.p > 100 * once.p
    alone = compare_scores_of_items(*(side.astype(float) for side in pair))
    assert alone.p == pytest.approx(once.p)


@pytest.mark.parametrize(("low", "high", "p", "verdict"), [
    (0.1, 5.0, 0.01, "learned"),
    (0.1, 5.0, 0.06, "kept"),
    (-1.9, 5.0, 0.5, "kept"),
    (-1.9, -0.1, 0.001, "kept"),
    (-2.1, -0.1, 0.001, "forgot"),
    (-2.1, -0.1, 0.05, "undecided"),
    (-9.0, -5.0, 0.001, "forgot"),
    (-2.1, 0.1, 0.001, "undecided"),
])  # fmt: skip
def test_verdicts_at_their_edges(low, high, p, verdict):
    assert decide(low, high, p_adjusted=p, margin=2.0) == verdict


def test_what_is_surely_worse_by_less_than_the_margin_is_said():
    found = judged(compare_hits("accuracy", *answers(0, 30, 5000, 4970)))
    assert (found.verdict, found.needed) == ("kept", None)
    assert found.detail == "kept: surely worse, −0.3 points, but at most 0.4 points: less than the margin"


def test_the_words_say_how_much():
    before = np.full(40, 260.0)
    worse = before + 1.3 + 0.1 * (np.arange(40) % 3 - 1)
    tokens = np.full(40, 100)
    change = compare_losses(before, worse, tokens)
    assert judged(change, margin=0.1).detail == "forgot: +0.013 nats/token (+0.5 %) (95 % +0.013 to +0.013)"
    assert judged(change).detail.startswith("kept: surely worse, +0.013 nats/token (+0.5 %), but at most 0.013")
    assert judged(compare_losses(worse, before, tokens)).detail.startswith("learned: −0.013 nats/token (−0.5 %)")
    assert judged(compare_hits("accuracy", *answers(0, 21, 79, 0))).detail.startswith("forgot: −21.0 points (95 % −")
    few = judged(compare_hits("accuracy", *answers(0, MIN_ITEMS - 1, 0, 0)))
    assert (few.verdict, few.needed) == ("undecided", MIN_ITEMS)
    assert few.detail == "undecided: 9 items, a verdict needs 10"


@pytest.mark.parametrize(("gained", "lost", "items"), [(10, 14, 200), (5, 5, 300), (0, 0, 60), (4, 10, 100)])
def test_the_items_needed_decide_in_four_of_five_cases(gained, lost, items):
    """Drawn anew, as many items with the chances assumed; with next to no flips the normal formula says too few."""
    found = judged(compare_hits("accuracy", *answers(gained, lost, items - gained - lost, 0)))
    assert found.verdict == "undecided"
    assert found.needed is not None
    assert found.needed > items
    assert f"about {found.needed:,} items would decide" in found.detail
    flips, difference = (gained + lost + 1) / (items + 2), (gained - lost) / items
    chances = [(flips + difference) / 2, (flips - difference) / 2, 1 - flips]
    drawn = np.random.default_rng(0).multinomial(found.needed, chances, size=2000)
    low, high = tango(drawn[:, 0], drawn[:, 1], found.needed)
    p = mcnemar(drawn[:, 0], drawn[:, 1])
    decided = (100 * low > -2) | ((p < 0.05) & ((low > 0) | (high < 0)))
    assert (0.70 if gained + lost else 0.60) < decided.mean() < 0.95


def test_sample_sizes_by_hand():
    null, found = 0.15, 0.15 - 0.05**2
    expected = ((1.959964 * math.sqrt(null) + 0.841621 * math.sqrt(found)) / 0.05) ** 2  # Connor 1987
    assert to_detect(-0.05, null, found) == pytest.approx(expected, rel=1e-5)
    assert to_detect(-0.05, null, found, tests=10) > 1.5 * expected
    assert to_keep(0.0, 0.1, margin=0.02) == pytest.approx((1.959964 + 0.841621) ** 2 * 0.1 / 0.0004, rel=1e-5)
    assert (to_keep(-3, 1, margin=2), to_detect(0, 1, 1)) == (math.inf, math.inf)
    assert (rounded(1341.2, above=200), rounded(12.0, above=200), rounded(2e6, above=1)) == (1400, 210, None)


@pytest.mark.parametrize(("found", "written"), [
    (format_value(0.2234, "accuracy"), "22.3 %"),
    (format_value(0.0, "pass"), "0 %"),
    (format_value(1.7424, "loss"), "1.742"),
    (format_signed(-0.0213, "loss"), "−0.021"),
    (format_signed(0.00042, "loss"), "+0.00042"),
    (format_signed(-0.021, "accuracy"), "−2.1 points"),
    (format_range(-0.05, -0.0001, "score"), "−5.0 to +0.0"),
    (format_p(0.0312), "p = 0.031"),
    (format_p(1e-9), "p < 0.001"),
])  # fmt: skip
def test_numbers_are_written_for_people(found, written):
    assert found == written
