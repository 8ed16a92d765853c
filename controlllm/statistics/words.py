"""Numbers as people read them."""

import math
from collections.abc import Iterable
from typing import Literal

Metric = Literal["loss", "accuracy", "exact_match", "pass", "score"]

MEASURES: dict[Metric, str] = {
    "loss": "loss, nats per token",
    "accuracy": "answered right",
    "exact_match": "solved",
    "pass": "passed its tests",
    "score": "score",
}


def format_value(value: float, metric: str) -> str:
    """`1.742` for a loss, `22.3 %` for a share of right answers."""
    return f"{value:.3f}" if metric == "loss" else f"{100 * value:.1f}".removesuffix(".0") + " %"


def format_signed(value: float, metric: str) -> str:
    """`+0.013` for a loss, `−2.1 points` for a share of right answers."""
    if metric != "loss":
        return f"{_signed(100 * value, 1)} points"
    return _signed(value, 3 if abs(value) >= 0.001 or value == 0 else 5)


def format_relative(value: float, before: float) -> str:
    """`+0.5 %` of the base model's loss."""
    share = 100 * value / before if before else math.inf
    return f"{_signed(share, 1 if abs(share) >= 0.1 or share == 0 else 2)} %"


def format_range(low: float, high: float, metric: str) -> str:
    """`−5.0 to −1.2` points, or nats per token: the unit is said beside it."""
    if metric != "loss":
        return f"{_signed(100 * low, 1)} to {_signed(100 * high, 1)}"
    return f"{format_signed(low, metric)} to {format_signed(high, metric)}"


def format_p(p: float) -> str:
    """`p = 0.031`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def format_items(count: int | None) -> str:
    """`about 1,400 items would decide`."""
    return f"about {count:,} items would decide" if count else "no practical number of items would decide"


def margin_unit(metric: str, before: float) -> float:
    """Factor from a difference to the margin's unit, up is better: points, or per cent of the base's loss."""
    return -100 / max(before, 1e-9) if metric == "loss" else 100.0


def unit_of(metrics: Iterable[str]) -> str:
    """Of a change, in the margin's unit, that is the mean over tasks with these metrics."""
    losses = {metric == "loss" for metric in metrics}
    return "points or % of a loss" if len(losses) > 1 else "% of the base's loss" if losses == {True} else "points"


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return (text if float(text) else f"+{abs(float(text)):.{digits}f}").replace("-", "−")
