"""p values of a paired difference, exact where that can be, and their correction for looking at several tasks."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

FLIPS = 9_999
EXACT_ITEMS = 16
"""Up to so many items that differ, all 2^n signs are tried."""
SEED = 0


def mcnemar(gained: ArrayLike, lost: ArrayLike) -> NDArray:
    """Two-sided exact p: min(1, 2 P(X <= min(gained, lost))), X ~ Binomial(gained + lost, 1/2) (McNemar 1947).

    Broadcasts. Not the mid-p: it is a little stronger, but without the guarantee that at most 5 % are false alarms.
    """
    from scipy.special import bdtr

    gained, lost = np.asarray(gained, dtype=np.int64), np.asarray(lost, dtype=np.int64)
    return np.minimum(1.0, 2 * bdtr(np.minimum(gained, lost), gained + lost, 0.5))


def flip_test(values: NDArray) -> float:
    """Two-sided p of sum(values) when every sign is the toss of a coin (Fisher 1935).

    If two models are alike, which of them had the better value is chance at every item. Of right and wrong answers it
    is McNemar's test. Exact for values of one size and for few; else a sample of signs, p = (1 + as extreme) /
    (1 + sampled) (Phipson & Smyth 2010).
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[values != 0]
    sizes, counts = np.unique(np.abs(values), return_counts=True)
    if len(sizes) <= 1:
        return float(mcnemar((values > 0).sum(), (values < 0).sum()))
    reach = abs(values.sum()) - 1e-9 * sizes[-1]  # equal sums are as extreme, whatever their rounding
    if len(values) <= EXACT_ITEMS:
        signs = (np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1) * 2.0 - 1  # (2^n, n)
        return float((np.abs(signs @ values) >= reach).mean())
    sums = _of_sizes(sizes, counts) if 4 * len(sizes) <= len(values) else _of_bits(values)
    return float((1 + (np.abs(sums) >= reach).sum()) / (1 + FLIPS))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values: below 0.05 anywhere, by chance alone, in at most 5 % of families (Holm 1979).

    Whatever the tests have to do with each other: a task and the suite it belongs to may stand in one family.
    """
    adjusted = [0.0] * len(p)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = highest
    return adjusted


def _of_sizes(sizes: NDArray, counts: NDArray) -> NDArray:
    """Sums under sampled signs, (FLIPS,), of many values that have few sizes: how many are up is binomial."""
    ups = np.random.default_rng(SEED).binomial(counts, 0.5, size=(FLIPS, len(counts)))
    return (2 * ups - counts) @ sizes


def _of_bits(values: NDArray) -> NDArray:
    """Sums under sampled signs, (FLIPS,)."""
    generator = np.random.default_rng(SEED)
    at_once = max(1, 4_000_000 // len(values))  # bounds the memory
    sums = []
    for start in range(0, FLIPS, at_once):
        size = (min(at_once, FLIPS - start), -(-len(values) // 8))
        bits = np.unpackbits(generator.integers(256, size=size, dtype=np.uint8), axis=1)[:, : len(values)]
        sums.append(2 * (bits.astype(np.float64) @ values) - values.sum())
    return np.concatenate(sums)
