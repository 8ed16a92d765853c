"""95 % intervals of a paired difference: of shares, of means and ratios, and of the mean over several tasks."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z = 1.959963984540054
"""The normal quantile of 97.5 %."""
RESAMPLES = 10_000
FEWEST_RESAMPLES = 2_000
SEED = 0
DRAWS = 20_000_000
"""Items drawn for one interval, at most, unless the fewest resamples need more."""


def tango(gained: ArrayLike, lost: ArrayLike, items: ArrayLike) -> tuple[NDArray, NDArray]:
    """Score interval of (gained - lost) / items, the paired difference of two shares (Tango 1998). Broadcasts.

    Its ends are the differences D at which the score test of D just rejects. It needs no flips to have a width
    (without any: ±z²/(items + z²)) and never leaves -1..1.
    """
    gained, lost, items = np.broadcast_arrays(*(np.asarray(a, dtype=np.float64) for a in (gained, lost, items)))
    return _tango_low(gained, lost, items), -_tango_low(lost, gained, items)


def bootstrap(difference: NDArray, weight: NDArray) -> tuple[float, float]:
    """Studentised bootstrap interval of sum(difference) / sum(weight) over items.

    Whole items are drawn with replacement, both models' values together: what makes an item easy or hard for both
    cancels. The quantiles are those of (ratio* - ratio) / error* (Efron & Tibshirani 1993, section 12.5; Hall 1992):
    with skewed values and few items it covers where percentile and BCa intervals are too narrow. Neither end is nearer
    than that of Student's interval, which holds for heavy tails and where hardly an item differs. The seed is fixed.
    """
    count, total = len(weight), weight.sum()
    ratio = difference.sum() / total
    error = ratio_error(difference, weight)
    if error == 0.0:
        return float(ratio), float(ratio)
    from scipy.special import stdtrit

    reach = float(stdtrit(count - 1, 0.975))
    spread = _studentised(difference - ratio * weight, weight)
    low, high = (-reach, reach) if spread is None else np.quantile(spread, (0.025, 0.975))
    return float(ratio - max(high, reach) * error), float(ratio - min(low, -reach) * error)


def ratio_error(value: NDArray, weight: NDArray) -> float:
    """Standard error of sum(value) / sum(weight), linearised (Cochran 1977, section 6.4).

    With weights of 1 it is the familiar sqrt(p (1 - p) / n), up to n / (n - 1).
    """
    count = len(value)
    residual = value - value.sum() / weight.sum() * weight
    return float(math.sqrt(count / max(count - 1, 1) * (residual**2).sum()) / weight.sum())


def mean_interval(values: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    """Interval of the mean of independent values, each with one of its own (MOVER: Zou & Donner 2008).

    It takes over what the single intervals know: their skewness, and a width where nothing flipped.
    """
    mean, count = math.fsum(values) / len(values), len(values)
    down = math.sqrt(math.fsum((v - low) ** 2 for v, low in zip(values, lows, strict=True))) / count
    up = math.sqrt(math.fsum((high - v) ** 2 for v, high in zip(values, highs, strict=True))) / count
    return mean - down, mean + up


def _tango_low(gained: NDArray, lost: NDArray, items: NDArray) -> NDArray:
    """By bisection between -1 and the difference found: the score falls with D."""
    found = (gained - lost) / items
    below, above = np.full_like(found, -1.0), found.copy()
    for _ in range(50):
        middle = (below + above) / 2
        # The share of items lost, most likely when the difference is `middle`: the root of a quadratic.
        b = (2 * items - gained + lost) * middle - gained - lost
        c = -lost * middle * (1 - middle)
        share = (np.sqrt(np.maximum(b * b - 8 * items * c, 0.0)) - b) / (4 * items)
        variance = np.maximum(items * (2 * share + middle * (1 - middle)), 0.0)
        rejects = (gained - lost - items * middle) ** 2 > Z**2 * variance
        below, above = np.where(rejects, middle, below), np.where(rejects, above, middle)
    return (below + above) / 2


def _studentised(residual: NDArray, weight: NDArray) -> NDArray | None:
    """(ratio* - ratio) / error* of resamples (count,), or None where one of them has no error."""
    count = len(weight)
    resamples = int(np.clip(DRAWS // count, FEWEST_RESAMPLES, RESAMPLES))
    generator = np.random.default_rng(SEED)
    at_once = max(1, 4_000_000 // count)  # bounds the memory, whatever the number of items
    spread = []
    for start in range(0, resamples, at_once):
        size = (min(at_once, resamples - start), count)
        drawn = generator.integers(count, size=size, dtype=np.int32)  # (resamples, items)
        r, w = residual[drawn], weight[drawn]
        total = r.sum(axis=1)
        shift = total / w.sum(axis=1)
        squares = np.einsum("bn,bn->b", r, r) - shift * (
            2 * np.einsum("bn,bn->b", r, w) - shift * np.einsum("bn,bn->b", w, w)
        )
        error = np.sqrt(np.maximum(squares, 0.0) * count / (count - 1))
        if (error <= 1e-6 * np.abs(residual).max()).any():  # zero, but for rounding
            return None
        spread.append(total / error)
    return np.concatenate(spread)
