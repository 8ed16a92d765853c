"""How many items would decide what these left open."""

import math

POWER_Z = 0.8416212335729143
"""The normal quantile of 80 %: the chance that so many items do decide."""
MOST = 1_000_000
"""More items than that are no answer."""


def to_detect(difference: float, null_variance: float, variance: float, *, tests: int = 1) -> float:
    """Items at which a real difference of this size is found at 5 % in 80 % of cases; infinite for none.

    n = (z_a sqrt(v0) + z_b sqrt(v))² / d²: for right and wrong answers v0 is the share of items that flip and v is
    v0 - d² (Connor 1987, for McNemar's test); z_a at 5 % / tests, as the smallest of several p values is judged.
    """
    from scipy.special import ndtri

    if difference == 0:
        return math.inf
    z = -float(ndtri(0.025 / tests))
    return ((z * math.sqrt(null_variance) + POWER_Z * math.sqrt(max(variance, 0.0))) / difference) ** 2


def to_keep(difference: float, variance: float, *, margin: float) -> float:
    """Items at which it is shown, in 80 % of cases, that the fall is less than the margin; infinite if it is not.

    n = (z_a + z_b)² v / (d + margin)²: the sample size of a paired non-inferiority test (Nam 1997).
    """
    if difference + margin <= 0:
        return math.inf
    return (1.959963984540054 + POWER_Z) ** 2 * variance / (difference + margin) ** 2


def rounded(items: float, *, above: int) -> int | None:
    """Upwards to two digits, and more than there were; None where that is not practical."""
    items = max(items, above + 1.0)
    if items > MOST:
        return None
    step = 10 ** max(0, len(str(math.ceil(items))) - 2)
    return math.ceil(items / step) * step
