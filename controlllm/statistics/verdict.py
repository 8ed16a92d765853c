"""What may be said about a change: learned, kept, forgot or undecided, and in which words."""

from dataclasses import dataclass
from typing import Literal

from controlllm.statistics.change import Change
from controlllm.statistics.size import rounded, to_detect, to_keep
from controlllm.statistics.words import format_items, format_range, format_relative, format_signed

Verdict = Literal["learned", "kept", "forgot", "undecided", "drifted"]
ALPHA = 0.05
MIN_ITEMS = 10
"""Fewer are no sample: no verdict."""


@dataclass(frozen=True)
class Judged:
    verdict: Verdict
    detail: str
    """The same in words, with the numbers."""
    needed: int | None
    """Of undecided: how many items would decide it, in 80 % of cases; None for more than is practical."""


def decide(low: float, high: float, *, p_adjusted: float, margin: float) -> Verdict:
    """low and high in the margin's unit, up is better.

    learned: surely better. kept: surely not worse than the margin, even where it is surely worse by less, which the
    words then say. forgot: surely worse, and maybe by more than the margin. undecided: none of them.
    """
    sure = p_adjusted < ALPHA
    if sure and low > 0:
        return "learned"
    if low > -margin:
        return "kept"
    return "forgot" if sure and high < 0 else "undecided"


def judge(change: Change, *, p_adjusted: float, margin: float, tests: int) -> Judged:
    """margin: points of right answers, or per cent of the base's loss; tests: how many p values are judged together."""
    if change.items < MIN_ITEMS:
        return Judged("undecided", f"undecided: {change.items} items, a verdict needs {MIN_ITEMS}", MIN_ITEMS)
    value, low, high = change.improvement
    verdict = decide(low, high, p_adjusted=p_adjusted, margin=margin)
    needed = None
    if verdict == "undecided":
        null, found = change.variances
        needed = needed_items(value, null, found, items=change.items, margin=margin, tests=tests)
    return Judged(verdict, _describe(verdict, change, p_adjusted, needed), needed)


def needed_items(value: float, null: float, found: float, *, items: int, margin: float, tests: int = 1) -> int | None:
    """The fewer of those that find the difference and those that show that it is within the margin."""
    ways = to_detect(value, null, found, tests=tests), to_keep(value, found, margin=margin)
    return rounded(min(ways), above=items)


def describe_drift(change: Change) -> str:
    return f"drifted {format_signed(change.difference, 'loss').removeprefix('+')} nats/token"


def is_surely_worse(high: float, p_adjusted: float) -> bool:
    """Also of a skill that is kept, because it fell by less than the margin."""
    return p_adjusted < ALPHA and high < 0


def amount(value: float, change: Change) -> str:
    """`−2.1 points`, `+0.013 nats/token (+0.5 %)`."""
    if change.metric != "loss":
        return format_signed(value, change.metric)
    return f"{format_signed(value, 'loss')} nats/token ({format_relative(value, change.before)})"


def _describe(verdict: Verdict, change: Change, p_adjusted: float, needed: int | None) -> str:
    found = amount(change.difference, change)
    between = f"95 % {format_range(change.low, change.high, change.metric)}"
    if verdict == "kept":
        _, low, high = change.improvement
        worst = amount(low / change.unit, change).lstrip("+−")
        if is_surely_worse(high, p_adjusted):
            return f"kept: surely worse, {found}, but at most {worst}: less than the margin"
        return f"kept: at most {worst} worse" if low < 0 else f"kept: {found}"
    if verdict == "undecided":
        return f"undecided: {found} ({between}); {format_items(needed)}"
    return f"{verdict}: {found} ({between})"
