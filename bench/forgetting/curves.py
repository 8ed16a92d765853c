"""From runs to a curve per method: the least that is forgotten at a gain, over learning rates and steps, by seed."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from experiment import Json

Measure = Literal["old", "kl"]
Way = list[tuple[float, float]]
"""Points (gain, forgotten) of one run in their order, the base model's (0, 0) first."""
DIAL = " + dial"


@dataclass(frozen=True)
class Cell:
    """What a method forgets at a gain."""

    values: tuple[float, ...]
    """Nats, of the seeds that reached the gain."""
    seeds: int
    """All that were run."""

    @property
    def mean(self) -> float:
        return fmean(self.values) if self.values else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over seeds, of a sample."""
        return stdev(self.values) if len(self.values) > 1 else math.nan


class Results:
    """Runs that are done."""

    def __init__(self, runs: Iterable[Json]):
        self.runs = list(runs)

    @classmethod
    def read(cls, folder: Path) -> "Results":
        return cls(json.loads(file.read_text()) for file in sorted(folder.glob("*.json")))

    def of_seed(self, seed: int) -> "Results":
        return Results(run for run in self.runs if run["seed"] == seed)

    def names(self, methods: Sequence[str]) -> list[str]:
        """Of the curves: the methods that were run, each with its dial where there is one."""
        found = []
        for method in methods:
            own = [run for run in self.runs if run["method"] == method]
            found += [method] if own else []
            found += [method + DIAL] if any(p["scale"] != 1 for run in own for p in run["points"]) else []
        return found

    def seeds(self, name: str) -> list[int]:
        return sorted({run["seed"] for run in self.runs if run["method"] == name.removesuffix(DIAL)})

    def cell(self, name: str, measure: Measure, gain: float) -> Cell:
        seeds = self.seeds(name)
        values = (self.least(name, seed, measure, gain) for seed in seeds)
        return Cell(tuple(v for v in values if v is not None), len(seeds))

    def least(self, name: str, seed: int, measure: Measure, gain: float) -> float | None:
        """The least that is forgotten with this gain or more; None where no run has it."""
        ways = (way for run in self.runs if (run["method"], run["seed"]) == (name.removesuffix(DIAL), seed)
                for way in _ways(run, measure, dial=name.endswith(DIAL)))  # fmt: skip
        return min((value for way in ways for value in _at_least(way, gain)), default=None)

    def deciding(self, method: str, levels: Sequence[float]) -> list[str]:
        """Learning rates that forget least at some level, dial or not; first what does by KL most often."""
        own = [run for run in self.runs if run["method"] == method]
        alone = {run["lr"]: Results([run]) for run in own}
        won: dict[Measure, Counter[str]] = {"kl": Counter(), "old": Counter()}
        for name in self.names([method]):
            for measure, wins in won.items():
                for level in levels:
                    least = {lr: one.cell(name, measure, level).mean for lr, one in alone.items()}
                    reached = {lr: value for lr, value in least.items() if not math.isnan(value)}
                    wins.update([min(reached, key=lambda lr: reached[lr])] if reached else ())
        found = [lr for lr in alone if won["kl"][lr] or won["old"][lr]]
        return sorted(found, key=lambda lr: (won["kl"][lr], won["old"][lr]), reverse=True) or list(alone)

    def score(self, name: str, levels: Sequence[float]) -> float:
        """Mean KL over the levels, infinite when one is not reached by all seeds: what settings are ranked by."""
        cells = [self.cell(name, "kl", level) for level in levels]
        return fmean(cell.mean if len(cell.values) == cell.seeds else math.inf for cell in cells)


def _ways(run: Json, measure: Measure, *, dial: bool) -> Iterator[Way]:
    """Along the steps; with `dial` also from the base to the trained model by alpha_scale."""
    base = run["points"][0]
    trained = [point for point in run["points"] if point["scale"] == 1]
    yield [_place(point, base, measure) for point in trained]
    if dial:
        scaled = sorted((p for p in run["points"] if p["scale"] != 1), key=lambda p: p["scale"])
        yield [_place(point, base, measure) for point in (base, *scaled, trained[-1])]


def _place(point: Json, base: Json, measure: Measure) -> tuple[float, float]:
    """(gain, forgotten) in nats; of the old skills the mean."""
    forgotten = fmean(value - base[measure][name] for name, value in point[measure].items())
    return base["new"] - point["new"], forgotten


def _at_least(way: Way, gain: float) -> Iterator[float]:
    """What is forgotten at the points with the gain or more, and where straight lines between two points reach it."""
    yield from (forgotten for have, forgotten in way if have >= gain)
    for (have, before), (later, after) in pairwise(way):
        if min(have, later) < gain < max(have, later):
            yield before + (after - before) * (gain - have) / (later - have)
