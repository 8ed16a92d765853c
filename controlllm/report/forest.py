"""The chart of what was learned and forgotten: a line for each task with its change and the 95 % interval.

It is made of text and boxes with places in per cent, so that a phone shows it as well as a wide screen, and a screen
reader reads it. Better is always to the right.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from controlllm.statistics import format_relative, format_signed, format_value

Json = dict[str, Any]
VERDICTS = ("learned", "kept", "undecided", "forgot")
TITLES = {"new": "New skills", "old": "Old skills", "drift": "Drift from the base model’s own answers"}
UNITS = {"points": "right answers, in points", "per cent": "loss, in per cent of the base’s", "nats": "nats per token"}
LEAST = {"points": 1.0, "per cent": 0.5, "nats": 0.02}
"""Half of the smallest scale: a trifle must look like one."""


@dataclass(frozen=True)
class Mark:
    """One run's change. Places are per cent of the scale."""

    run: int
    verdict: str
    detail: str
    before: str
    after: str
    change: str
    interval: str
    left: float
    width: float
    dot: float
    better: float
    """For sorting: the change, larger is better."""


@dataclass(frozen=True)
class Line:
    """A task, or a suite with its tasks below it."""

    title: str
    note: str
    marks: list[Mark]
    tasks: list["Line"] = field(default_factory=list)

    @property
    def counts(self) -> list[tuple[str, int]]:
        return count_verdicts([line.marks[0].verdict for line in self.tasks])


@dataclass(frozen=True)
class Panel:
    title: str
    lines: list[Line]
    zero: float
    margin: tuple[float, float] | None
    """Left end and width of what counts as kept."""
    ticks: list[tuple[float, str]]
    expand: bool
    """Whether suites are shown with their tasks from the start."""


def count_verdicts(verdicts: Sequence[str]) -> list[tuple[str, int]]:
    found = Counter(verdicts)
    return [(verdict, found[verdict]) for verdict in VERDICTS if found[verdict]]


def panels(runs: Sequence[Json]) -> list[Panel]:
    """One for each side and unit that was measured."""
    margin = runs[0]["comparison"]["margin"]
    tasks = runs[0]["comparison"]["tasks"]
    found = []
    for role, title in TITLES.items():
        for unit in UNITS:
            names = [name for name, task in tasks.items() if task["role"] == role and unit_of(task) == unit]
            if names:
                found.append(_panel(f"{title}: {UNITS[unit]}", names, unit, runs, margin if role == "old" else 0.0))
    return found


def unit_of(task: Mapping[str, Any]) -> str:
    if task["role"] == "drift":
        return "nats"
    return "per cent" if task["metric"] == "loss" else "points"


def better(task: Mapping[str, Any], name: str) -> float:
    """A difference as it is drawn: in the unit of its panel, larger is better."""
    if unit_of(task) == "points":
        return 100 * task[name]
    if unit_of(task) == "nats":
        return -task[name]
    return -100 * task[name] / task["before"] if task["before"] else 0.0


def _panel(title: str, names: list[str], unit: str, runs: Sequence[Json], margin: float) -> Panel:
    entries = {name: [run["comparison"]["tasks"].get(name) for run in runs] for name in names}
    suites = _whole_suites(runs[0]["comparison"], names)
    totals = {suite: [run["comparison"]["suites"].get(suite) for run in runs] for suite in suites}
    shown = [entry for row in entries.values() for entry in row if entry]
    ends = [better(entry, end) for entry in shown for end in ("low", "high")]
    least = max(LEAST[unit], 1.25 * margin)
    low, high = min(-least, *ends), max(least if unit != "nats" else 0.0, *ends)
    room = 0.03 * (high - low)
    scale = _Scale(low - room, high + room)
    inside = {name for names_of in suites.values() for name in names_of}
    lines = [_line(entries[name], scale) for name in names if name not in inside]
    for suite, names_of in suites.items():
        below = _sorted([_line(entries[name], scale) for name in names_of], title)
        lines.append(_suite(totals[suite], unit, below, scale))
    return Panel(
        title,
        _sorted(lines, title),
        scale(0.0),
        (scale(-margin), scale(margin) - scale(-margin)) if margin else None,
        [(scale(tick), _tick(tick, unit)) for tick in _ticks(low, high)],
        expand=len(names) <= 8,
    )


def _sorted(lines: list[Line], title: str) -> list[Line]:
    """What was forgotten first; of new skills, what was learned best."""
    return sorted(lines, key=lambda line: line.marks[0].better, reverse=title.startswith(TITLES["new"]))


def _whole_suites(comparison: Json, names: Sequence[str]) -> dict[str, list[str]]:
    """Suites all of whose tasks are in this panel: only their mean has a place on its scale."""
    suites = {name: list(suite["tasks"]) for name, suite in comparison["suites"].items()}
    return {name: tasks for name, tasks in suites.items() if len(tasks) > 1 and set(tasks) <= set(names)}


def _line(entries: Sequence[Json | None], scale: "_Scale") -> Line:
    first = entries[0]
    assert first, "the first run is the one whose tasks are shown"
    marks = [_mark(number, entry, unit_of(entry), scale) for number, entry in enumerate(entries) if entry]
    return Line(first["title"], f"{first['items']:,} items", marks)


def _suite(entries: Sequence[Json | None], unit: str, tasks: list[Line], scale: "_Scale") -> Line:
    first = entries[0]
    assert first, "the first run is the one whose suites are shown"
    marks = [_mark(number, entry | {"role": "old"}, unit, scale) for number, entry in enumerate(entries) if entry]
    return Line(first["title"], f"mean of {len(tasks)} tasks", marks, tasks)


def _mark(run: int, entry: Json, unit: str, scale: "_Scale") -> Mark:
    low, high = sorted((better(entry, "low"), better(entry, "high")))
    metric = entry["metric"]
    if unit == "per cent":
        texts = [format_relative(entry[name], entry["before"]) for name in ("difference", "low", "high")]
    else:
        texts = [format_signed(entry[name], metric).removesuffix(" points") for name in ("difference", "low", "high")]
    left, right = scale(low), scale(high)
    return Mark(
        run,
        entry["verdict"],
        entry["detail"],
        format_value(entry["before"], metric),
        format_value(entry["after"], metric),
        texts[0] + (" points" if unit == "points" else ""),
        f"{texts[1].removesuffix(' %')} to {texts[2]}",
        left,
        round(right - left, 2),
        scale(better(entry, "difference")),
        better(entry, "difference"),
    )


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float

    def __call__(self, value: float) -> float:
        """Its place, in per cent from the left; what lies beyond stands at the edge."""
        return round(min(max(100 * (value - self.low) / (self.high - self.low), 0.0), 100.0), 2)


def _ticks(low: float, high: float) -> list[float]:
    """About five round values, 0 among them."""
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _tick(value: float, unit: str) -> str:
    """In the metric's own sign: a loss that fell is better."""
    value = value if unit == "points" else -value
    text = f"{value:+g}".replace("-", "−") if value else "0"
    return text + (" %" if unit == "per cent" and value else "")
