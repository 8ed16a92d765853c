"""One metric of one task, before and after: the paired difference, its interval, its p value and its size."""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from controlllm.statistics.interval import bootstrap, ratio_error, tango
from controlllm.statistics.significance import flip_test, mcnemar
from controlllm.statistics.words import Metric, margin_unit


@dataclass(frozen=True)
class Change:
    """`low` and `high` bound the difference after - before with 95 %; they are not corrected for several tasks."""

    metric: Metric
    items: int
    clusters: int
    """Questions that differ: the same one asked several times says little more than asked once."""
    before: float
    after: float
    difference: float
    low: float
    high: float
    error: float
    """Standard error of the paired difference."""
    noise: float
    """Standard error of one model's score, the larger of the two; that of the paired difference is usually smaller."""
    p: float
    """Of no difference: exact McNemar test for right and wrong, else a test by flips of signs."""
    effect: dict[str, float | None]
    """cohens_g and odds_ratio (None: nothing lost) of the flips; standardised difference of losses and scores."""
    gained: int | None = None
    """Items wrong before and right after."""
    lost: int | None = None
    """Items right before and wrong after."""
    kept_right: int | None = None
    kept_wrong: int | None = None

    @property
    def unit(self) -> float:
        """From a difference to the margin's unit, up is better: points, or per cent of the base's loss."""
        return margin_unit(self.metric, self.before)

    @property
    def improvement(self) -> tuple[float, float, float]:
        """The difference and the ends of its interval, low before high, in the margin's unit."""
        low, high = sorted((self.low * self.unit, self.high * self.unit))
        return self.difference * self.unit, low, high

    @property
    def variances(self) -> tuple[float, float]:
        """Of one item's difference, in the margin's unit: if there were no change, and as it was found.

        Flips are counted as (flips + 1) / (items + 2), so that none of a few items does not mean never.
        """
        if self.gained is None or self.lost is None or self.clusters < self.items:
            found = self.items * (self.error * self.unit) ** 2
            return found, found
        flips = (self.gained + self.lost + 1) / (self.items + 2)
        return flips * self.unit**2, max(flips - self.difference**2, 0.0) * self.unit**2


def compare_losses(before: NDArray, after: NDArray, tokens: NDArray, clusters: NDArray | None = None) -> Change:
    """Nats of each item, (items,); per token, the ratio of sums: a long item counts for as much as its tokens."""
    return _of_values("loss", before, after, tokens.astype(np.float64), clusters)


def compare_scores_of_items(before: NDArray, after: NDArray, clusters: NDArray | None = None) -> Change:
    """A score within 0..1 of each item, (items,)."""
    return _of_values("score", before, after, np.ones(len(before)), clusters)


def compare_hits(metric: Metric, before: NDArray, after: NDArray, clusters: NDArray | None = None) -> Change:
    """Right or wrong of each item, (items,). clusters: a number for each question, (items,), where some are equal."""
    before, after, count = before.astype(bool), after.astype(bool), len(before)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    flips = {"gained": gained, "lost": lost, "kept_right": int((before & after).sum())}
    flips["kept_wrong"] = count - sum(flips.values())
    effect: dict[str, float | None] = {
        "cohens_g": (gained - lost) / (2 * (gained + lost)) if gained + lost else 0.0,
        "odds_ratio": gained / lost if lost else None,
    }
    if clusters is not None:
        change = _of_values(metric, before.astype(np.float64), after.astype(np.float64), np.ones(count), clusters)
        return replace(change, effect=effect, **flips)
    low, high = tango(gained, lost, count)
    difference = (gained - lost) / count
    shares = [float(values.mean()) for values in (before, after)]
    return Change(
        metric=metric,
        items=count,
        clusters=count,
        before=shares[0],
        after=shares[1],
        difference=difference,
        low=float(low),
        high=float(high),
        error=math.sqrt(max((gained + lost) / count - difference**2, 0.0) / count),
        noise=max(math.sqrt(share * (1 - share) / count) for share in shares),
        p=float(mcnemar(gained, lost)),
        effect=effect,
        **flips,
    )


def _of_values(metric: Metric, before: NDArray, after: NDArray, weight: NDArray, clusters: NDArray | None) -> Change:
    items = len(before)
    if clusters is not None:  # what is drawn and flipped is a question with all its items
        before, after, weight = (np.bincount(clusters, weights=values) for values in (before, after, weight))
    difference, total = after - before, weight.sum()
    low, high = bootstrap(difference, weight)
    if metric != "loss":
        low, high = max(low, -1.0), min(high, 1.0)
    error = ratio_error(difference, weight)
    ratio = float(difference.sum() / total)
    return Change(
        metric=metric,
        items=items,
        clusters=len(weight),
        before=float(before.sum() / total),
        after=float(after.sum() / total),
        difference=ratio,
        low=low,
        high=high,
        error=error,
        noise=max(ratio_error(before, weight), ratio_error(after, weight)),
        p=flip_test(difference),
        effect={"standardised": ratio / (error * math.sqrt(len(weight))) if error else 0.0},
    )
