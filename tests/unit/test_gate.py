"""The gate: what fell below its limit, or was not measured, is not promoted."""

import pytest
from measured_tasks import flipped, hits, losses, write_results

from controlllm.errors import UserError
from controlllm.gate import breaches, check_gate, gate_problems
from controlllm.statistics import compare_scores

RIGHT = [1, 1, 0] * 200


@pytest.fixture
def comparison(tmp_path):
    """gsm8k +20 points; mmlu -4, arc -2, their suite -3; prose 1 % more loss."""
    before = {
        "gsm8k": hits([0] * 200, role="new", suite="math"),
        "mmlu": hits(RIGHT),
        "arc": hits(RIGHT),
        "prose": losses([100.0] * 50, [40] * 50),
        "puzzles": hits([1] * 50, role="new", suite="probes"),
    }
    after = before | {
        "gsm8k": hits(flipped([0] * 200, lost=0, gained=40), role="new", suite="math"),
        "mmlu": hits(flipped(RIGHT, lost=30, gained=6)),
        "arc": hits(flipped(RIGHT, lost=20, gained=8)),
        "prose": losses([101.0] * 50, [40] * 50),
    }
    return compare_scores(write_results(tmp_path / "a", before), write_results(tmp_path / "b", after))


@pytest.mark.parametrize(("gate", "broken"), [
    ({"mmlu": -4.1, "general": -3.1, "prose": -1.1, "old": -2.4, "new": 9.9, "gsm8k": 19.9}, []),
    ({"mmlu": -3.9}, ["mmlu"]),
    ({"general": -2.9}, ["general"]),
    ({"prose": -0.9}, ["prose"]),
    ({"old": -2.2}, ["old"]),  # the mean of -4, -2 points and -1 %
    ({"new": 10.1}, ["new"]),
    ({"gsm8k": 21.0, "mmlu": -1.0}, ["gsm8k", "mmlu"]),
    ({"probes": -0.5}, ["prose"]),  # of both sides: each of its tasks
    ({"math": 21}, ["math"]),
    ({"arc": 0}, ["arc"]),
    ({"riddles": -1.0}, ["riddles"]),
    ({}, []),
])  # fmt: skip
def test_limits(comparison, gate, broken):
    assert [breach.name for breach in breaches(comparison, gate)] == broken


def test_the_message_has_the_numbers(comparison):
    with pytest.raises(UserError) as error:
        check_gate(comparison, {"general": -2.0, "gsm8k": 25.0, "old": -9.0})
    general = comparison["suites"]["general"]
    assert str(error.value) == (
        f"gate: general fell 3.00 points (95 % {-100 * general['high']:.2f} to {-100 * general['low']:.2f}), "
        "benchmark.gate allows 2 (and 1 more: gsm8k); the model is not promoted"
    )
    (breach,) = breaches(comparison, {"gsm8k": 25.0})
    assert (breach.difference, breach.limit) == (pytest.approx(20), 25)
    assert "gsm8k rose by 20.00 points (95 % " in breach.message
    assert breach.message.endswith("benchmark.gate demands a gain of 25")
    check_gate(comparison, {"general": -3.5})


def test_what_was_not_compared_is_not_promoted(comparison):
    left_out = comparison | {"left_out": {"bbh": "failed after: no data"}}
    assert [b.name for b in breaches(left_out, {"bbh": -50, "old": -50, "general": -50, "mmlu": -50})] == [
        "bbh", "old", "general",
    ]  # fmt: skip
    (breach,) = breaches(left_out, {"general": -50})
    assert breach.message == "bbh of general was not compared: failed after: no data; benchmark.gate holds general"
    assert breach.difference is None


def test_names_that_nobody_measures_are_refused():
    assert gate_problems({"general": -2, "old": -1, "new": 3, "mmlu": -1}, ["general", "mmlu"]) == []
    assert gate_problems({"generl": -2}, ["general"]) == [
        "benchmark.gate: generl is not measured; known: general, new, old"
    ]
