"""The gate: a model is promoted only if every named skill changed by at least what the recipe allows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from controlllm.errors import UserError
from controlllm.statistics.words import margin_unit, unit_of

Json = Mapping[str, Any]
SIDES = ("new", "old")


@dataclass(frozen=True)
class Breach:
    """A limit that was not reached. Numbers are points, or per cent of the base's loss; up is better.

    They are None where the skill was not compared: what nobody measured is not promoted.
    """

    name: str
    limit: float
    difference: float | None
    low: float | None
    high: float | None
    message: str


def breaches(comparison: Json, gate: Mapping[str, float]) -> list[Breach]:
    """Limits of `gate` ({"general": -2.0, "new": 5.0}) that compare_scores' result does not reach.

    A name is a task, a suite (the mean over its tasks; each of them, where it is of both sides), or new or old (the
    mean over all of that side). What counts is the change that was measured; its interval says how sure that is. A task
    that could not be compared fails its own limit and that of every suite or side, as it may belong there.
    """
    found: list[Breach] = []
    for name, limit in gate.items():
        unmeasured = [task for task in comparison["left_out"] if task == name or name not in comparison["tasks"]]
        found += [_unmeasured(name, task, limit, comparison["left_out"][task]) for task in unmeasured]
        changes = _changes(comparison, name)
        if not changes and not unmeasured:
            found.append(_unmeasured(name, name, limit, "it is not among what was compared"))
        found += [_breach(change, limit) for change in changes if change.difference < limit]
    return found


def check_gate(comparison: Json, gate: Mapping[str, float]) -> None:
    """UserError, one line, if the model must not be promoted."""
    if broken := breaches(comparison, gate):
        more = f" (and {len(broken) - 1} more: {', '.join(b.name for b in broken[1:])})" if len(broken) > 1 else ""
        raise UserError(f"gate: {broken[0].message}{more}; the model is not promoted")


def gate_problems(gate: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """A line for each name of `gate` that is neither new nor old nor in `names`, the tasks and suites measured."""
    known = sorted({*names, *SIDES})
    return [f"benchmark.gate: {name} is not measured; known: {', '.join(known)}" for name in gate if name not in known]


@dataclass(frozen=True)
class _Change:
    name: str
    difference: float
    low: float
    high: float
    unit: str


def _changes(comparison: Json, name: str) -> list[_Change]:
    """What the name stands for."""
    tasks, pools = comparison["tasks"], comparison["pools"]
    if name in tasks:
        return [_of_task(name, tasks[name])]
    if name in pools:
        pool = pools[name]
        return [_Change(name, pool["difference"], pool["low"], pool["high"], pool["unit"])]
    return [_of_task(task, each) for task, each in tasks.items() if name in (each["suite"], each["role"])]


def _of_task(name: str, task: Json) -> _Change:
    unit = margin_unit(task["metric"], task["before"])
    low, high = sorted((task["low"] * unit, task["high"] * unit))
    return _Change(name, task["difference"] * unit, low, high, unit_of([task["metric"]]))


def _breach(change: _Change, limit: float) -> Breach:
    """`general fell 3.10 points (95 % 1.20 to 5.00), benchmark.gate allows 2`."""
    low, high = change.low, change.high
    if change.difference < 0:
        moved, low, high = f"fell {-change.difference:.2f}", -high, -low
    else:
        moved = f"rose by {change.difference:.2f}"
    said = f"{change.name} {moved} {change.unit} (95 % {_number(low)} to {_number(high)})"
    wants = f"demands a gain of {limit:g}" if limit > 0 else f"allows {-limit:g}" if limit else "allows no fall"
    message = f"{said}, benchmark.gate {wants}"
    return Breach(change.name, limit, change.difference, change.low, change.high, message)


def _unmeasured(name: str, task: str, limit: float, why: str) -> Breach:
    of = "" if task == name else f" of {name}"
    return Breach(name, limit, None, None, None, f"{task}{of} was not compared: {why}; benchmark.gate holds {name}")


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
