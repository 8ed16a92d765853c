"""Two models on the same items: the paired difference, its 95 % interval, and what may be said about it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Metric = Literal["loss", "accuracy", "exact_match"]
Row = dict[str, Any]

MEASURES: dict[Metric, str] = {"loss": "loss, nats per token", "accuracy": "answered right", "exact_match": "solved"}
HITS: dict[str, Metric] = {"choice": "accuracy", "generate": "exact_match"}
"""What counts as right, by the kind of probe; the other kinds have a loss only."""

RESAMPLES = 10_000
SEED = 0
MIN_ITEMS = 10
"""Below this a bootstrap interval is far too narrow: no verdict."""


@dataclass(frozen=True)
class Change:
    """One metric of one probe, before and after; `low` and `high` bound the difference after - before."""

    metric: Metric
    items: int
    before: float
    after: float
    difference: float
    low: float
    high: float
    noise: float
    """Standard error of one model's score, the larger of the two; that of the paired difference is usually smaller."""
    gained: int | None = None
    """Items wrong before and right after."""
    lost: int | None = None
    """Items right before and wrong after."""
    p: float | None = None
    """Exact McNemar test of gained against lost."""

    @property
    def side(self) -> int:
        """1: better, the whole interval; -1: worse, the whole interval; 0: the interval includes no change."""
        sign = -1 if self.metric == "loss" else 1
        return sign * ((self.low > 0) - (self.high < 0))

    @property
    def worst(self) -> float:
        """The largest worsening inside the interval, 0 or more."""
        return max(self.high if self.metric == "loss" else -self.low, 0.0)


def compare_losses(before: Sequence[Row], after: Sequence[Row]) -> Change:
    """Loss per token, the ratio sum(loss) / sum(tokens): a long item counts for as much as its tokens."""
    loss_before, loss_after = _column(before, "loss"), _column(after, "loss")
    tokens = _column(before, "tokens")
    return _change("loss", loss_before, loss_after, tokens)


def compare_hits(metric: Metric, before: Sequence[Row], after: Sequence[Row]) -> Change:
    """Share of right items, with the exact McNemar test."""
    right_before, right_after = _column(before, "correct"), _column(after, "correct")
    gained = int(np.sum(right_after > right_before))
    lost = int(np.sum(right_after < right_before))
    paired = {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}
    return _change(metric, right_before, right_after, np.ones(len(before)), **paired)


def bootstrap(difference: NDArray, weight: NDArray) -> tuple[float, float]:
    """Percentile interval (95 %) of sum(difference) / sum(weight) over resampled items.

    Whole items are drawn with replacement, both models' values together (Efron & Tibshirani 1993, chapters 8 and 13):
    what makes an item easy or hard for both models cancels. The seed is fixed: the same items give the same interval.
    """
    generator = np.random.default_rng(SEED)
    at_once = max(1, 4_000_000 // len(weight))  # bounds the memory, whatever the number of items
    ratios = []
    for start in range(0, RESAMPLES, at_once):
        size = (min(at_once, RESAMPLES - start), len(weight))
        drawn = generator.integers(len(weight), size=size, dtype=np.int32)  # (resamples, items)
        ratios.append(difference[drawn].sum(axis=1) / weight[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), (0.025, 0.975))
    return float(low), float(high)


def ratio_error(value: NDArray, weight: NDArray) -> float:
    """Standard error of sum(value) / sum(weight), linearised (Cochran 1977, section 6.4).

    With weights of 1 it is the familiar sqrt(p (1 - p) / n), up to n / (n - 1).
    """
    count = len(value)
    residual = value - value.sum() / weight.sum() * weight
    return float(math.sqrt(count / max(count - 1, 1) * (residual**2).sum()) / weight.sum())


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p: min(1, 2 P(X <= min(gained, lost))), X ~ Binomial(gained + lost, 1/2) (McNemar 1947)."""
    count = gained + lost
    term = total = 1
    for k in range(min(gained, lost)):
        term = term * (count - k) // (k + 1)  # the next binomial coefficient, in whole numbers
        total += term
    return min(1.0, 2 * total / 2**count)


def judge_old(change: Change) -> Literal["kept", "improved", "lost", "unclear"]:
    """What happened to an old skill: lost only if the whole interval is worse, kept if it includes no change."""
    if change.items < MIN_ITEMS:
        return "unclear"
    return "improved" if change.side == 1 else "lost" if change.side == -1 else "kept"


def judge_new(changes: Iterable[Change]) -> Literal["learned", "not learned", "worse", "mixed", "unclear"]:
    """What happened to a new skill: learned if one of its measures is better, the whole interval, and none is worse."""
    changes = list(changes)
    if min(change.items for change in changes) < MIN_ITEMS:
        return "unclear"
    sides = {change.side for change in changes}
    if sides >= {1, -1}:
        return "mixed"
    return "learned" if 1 in sides else "worse" if -1 in sides else "not learned"


def compare_probe(probe: Row, before: Sequence[Row], after: Sequence[Row]) -> dict[str, Any]:
    """One probe's numbers and verdict, ready for JSON: those of its first metric at the top, of all under `metrics`.

    A new skill is judged by all its metrics; an old one by accuracy where it is multiple choice, else by its loss.
    Drift, the loss on the base model's own greedy answers, is a distance and gets no verdict.
    """
    changes = [compare_losses(before, after)]
    if probe["kind"] in HITS:
        changes.insert(0, compare_hits(HITS[probe["kind"]], before, after))
    if probe["role"] == "old" and probe["kind"] == "generate":
        changes.reverse()
    if probe["role"] == "new":
        verdict = judge_new(changes)
    else:
        verdict = "drifted" if probe["role"] == "drift" else judge_old(changes[0])
    about = {"title": probe["title"], "kind": probe["kind"], "tokens": sum(row["tokens"] for row in before)}
    about |= {"verdict": verdict, "detail": _describe(verdict, changes)}
    return about | asdict(changes[0]) | {"metrics": {change.metric: asdict(change) for change in changes}}


def _describe(verdict: str, changes: list[Change]) -> str:
    change = changes[0]
    if verdict == "unclear":
        return f"unclear: {change.items} items, a verdict needs {MIN_ITEMS}"
    if verdict == "kept":
        return f"kept: at most {format_amount(change.worst, change)} worse" if change.worst else "kept: no loss seen"
    if verdict == "drifted":
        return f"drifted {format_signed(change.difference, 'loss').removeprefix('+')} nats/token"
    if verdict in ("lost", "improved"):
        return f"{verdict} {format_amount(change.difference, change)}"
    return f"{verdict}: " + ", ".join(
        f"{MEASURES[c.metric].split(',')[0]} {format_signed(c.difference, c.metric)}" for c in changes
    )


def format_value(value: float, metric: str) -> str:
    """`1.742` for a loss, `22.3 %` for a share of right answers."""
    return f"{value:.3f}" if metric == "loss" else f"{100 * value:.1f}".removesuffix(".0") + " %"


def format_signed(value: float, metric: str) -> str:
    """`+0.013` for a loss, `−2.1 points` for a share of right answers."""
    if metric != "loss":
        return f"{100 * value:+.1f} points".replace("-", "−")
    return f"{value:+.{3 if abs(value) >= 0.001 or value == 0 else 5}f}".replace("-", "−")


def format_amount(value: float, change: Change) -> str:
    """How large a difference is, without its direction for points: `0.013 nats/token (+0.5 %)`, `2.1 points`."""
    if change.metric != "loss":
        return f"{abs(100 * value):.1f} points"
    return f"{format_signed(abs(value), 'loss')[1:]} nats/token ({format_relative(value, change.before)})"


def format_relative(value: float, before: float) -> str:
    """`+0.5 %` of the base model's loss."""
    share = 100 * value / before if before else math.inf
    return f"{share:+.{1 if abs(share) >= 0.1 or share == 0 else 2}f} %".replace("-", "−")


def format_p(p: float) -> str:
    """`p = 0.031`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _change(metric: Metric, before: NDArray, after: NDArray, weight: NDArray, **paired: Any) -> Change:
    low, high = bootstrap(after - before, weight)
    total = weight.sum()
    return Change(
        metric=metric,
        items=len(weight),
        before=float(before.sum() / total),
        after=float(after.sum() / total),
        difference=float((after - before).sum() / total),
        low=low,
        high=high,
        noise=max(ratio_error(before, weight), ratio_error(after, weight)),
        **paired,
    )


def _column(rows: Sequence[Row], name: str) -> NDArray:
    return np.array([row[name] for row in rows], dtype=np.float64)
