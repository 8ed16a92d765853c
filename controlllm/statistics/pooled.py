"""Several tasks together: suites, all old skills, all new ones, and the one sentence over everything."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlllm.statistics.change import Change
from controlllm.statistics.interval import Z, mean_interval
from controlllm.statistics.significance import flip_test
from controlllm.statistics.verdict import decide, is_surely_worse, needed_items
from controlllm.statistics.words import format_items, unit_of

Json = dict[str, Any]
NAMED = 4
"""Tasks that the sentence names for each verdict, before it only counts them."""


@dataclass(frozen=True)
class Compared:
    """One task's primary metric."""

    suite: str
    role: str
    change: Change
    flips: NDArray
    """What each question adds to `improvement`, (clusters,)."""


@dataclass(frozen=True)
class Pool:
    """Mean change over tasks, each with the same weight, in the margin's unit; up is better."""

    tasks: list[str]
    items: int
    unit: str
    difference: float
    low: float
    high: float
    p: float


def pool(tasks: Mapping[str, Compared]) -> Pool:
    """The interval joins those of the tasks (MOVER); p flips the signs of all their questions."""
    values, lows, highs = zip(*(task.change.improvement for task in tasks.values()), strict=True)
    low, high = mean_interval(values, lows, highs)
    alone = next(iter(tasks.values())) if len(tasks) == 1 else None
    return Pool(
        tasks=list(tasks),
        items=sum(task.change.items for task in tasks.values()),
        unit=unit_of(task.change.metric for task in tasks.values()),
        difference=math.fsum(values) / len(tasks),
        low=low,
        high=high,
        p=alone.change.p if alone else flip_test(np.concatenate([task.flips for task in tasks.values()])),
    )


def judge_pool(found: Pool, *, p_adjusted: float, margin: float) -> Json:
    """The pool as JSON, with its verdict; `needed`: items over all its tasks."""
    verdict = decide(found.low, found.high, p_adjusted=p_adjusted, margin=margin)
    needed = None
    if verdict == "undecided":
        variance = found.items * ((found.high - found.low) / (2 * Z)) ** 2
        needed = needed_items(found.difference, variance, variance, items=found.items, margin=margin)
    said = f"{_number(found.difference)} {found.unit} (95 % {_number(found.low)} to {_number(found.high)})"
    detail = f"{verdict}: {said}"
    if verdict == "undecided":
        detail += f"; {format_items(needed)}"
    elif verdict == "kept" and is_surely_worse(found.high, p_adjusted):
        detail = f"kept: surely worse, {said}, but by less than the margin"
    return vars(found) | {"p_adjusted": p_adjusted, "verdict": verdict, "needed": needed, "detail": detail}


def suite_means(tasks: Mapping[str, Json], pools: Mapping[str, Json]) -> dict[str, Json]:
    """Suites whose tasks are all shares of one side, with the mean score before and after."""
    found = {}
    for suite, pooled in pools.items():
        own = {name: tasks[name] for name in pooled["tasks"]}
        shares = all(task["metric"] != "loss" for task in own.values())
        if suite in ("new", "old") or len(own) < 2 or not shares or len({task["role"] for task in own.values()}) > 1:
            continue
        means = {end: math.fsum(task[end] for task in own.values()) / len(own) for end in ("before", "after")}
        change = {key: pooled[key] / 100 for key in ("difference", "low", "high")}
        rest = {key: pooled[key] for key in ("items", "p", "p_adjusted", "verdict", "detail", "needed")}
        found[suite] = {"title": suite, "metric": "score", "tasks": list(own)} | means | change | rest
    return found


def overall(tasks: Mapping[str, Json], suites: Mapping[str, Json], pools: Mapping[str, Json]) -> Json:
    """forgot if anything surely did; else, unless the old skills are surely kept, undecided; else learned or kept."""
    judged = {name: task for name, task in tasks.items() if task["role"] != "drift"}
    names = {
        verdict: [name for name, task in judged.items() if task["verdict"] == verdict]
        for verdict in ("learned", "kept", "forgot", "undecided")
    }
    everything = [task["verdict"] for task in (*judged.values(), *suites.values(), *pools.values())]
    old = pools.get("old")
    new = [t["verdict"] for t in (*judged.values(), *suites.values()) if t.get("role") == "new"]
    new += [pools["new"]["verdict"]] if "new" in pools else []
    has_old = any(task["role"] == "old" for task in judged.values())
    if "forgot" in everything:
        verdict = "forgot"
    elif has_old and (old is None or old["verdict"] == "undecided"):
        verdict = "undecided"
    elif "learned" in (new or everything):
        verdict = "learned"
    else:
        verdict = "kept" if has_old or "undecided" not in new else "undecided"
    return {"verdict": verdict, "sentence": _sentence(judged, names, pools), **names}


def _sentence(tasks: Mapping[str, Json], names: Mapping[str, Sequence[str]], pools: Mapping[str, Json]) -> str:
    """`Learned Puzzles (+22.3 points). Forgot nothing that 1,234 items could show: on average at most 1.1 points.`"""
    parts = []
    if names["learned"]:
        parts.append(f"Learned {_listed(names['learned'], tasks)}.")
    elif new := [task for task in tasks.values() if task["role"] == "new"]:
        parts.append(f"Learned nothing that {sum(task['items'] for task in new):,} items could show.")
    old = pools.get("old")
    average = "" if old is None else _average(old)
    if names["forgot"]:
        parts.append(f"Forgot {_listed(names['forgot'], tasks)}{'; ' + average if average else ''}.")
    elif old is not None and old["verdict"] == "forgot":
        parts.append(f"Forgot some of what was known, though no single task surely: {average}.")
    elif old is not None:
        parts.append(f"Forgot nothing that {old['items']:,} items could show: {average}.")
    slipped = [name for name in names["kept"] if tasks[name]["slipped"]]
    if slipped:
        parts.append(f"Within the margin, but surely worse: {_listed(slipped, tasks)}.")
    if names["undecided"]:
        shown = ", ".join(tasks[name]["title"] for name in names["undecided"][:NAMED])
        parts.append(f"Undecided: {shown}{_rest(names['undecided'])}.")
    return " ".join(parts)


def _average(old: Json) -> str:
    if old["low"] == old["high"] == 0:
        return f"no change at all over {len(old['tasks'])} old skill{'s' if old['tasks'][1:] else ''}"
    if old["low"] >= 0:
        return f"on average {_number(old['difference']).lstrip('+')} {old['unit']} better over old skills"
    worst = f"at most {-old['low']:.1f} {old['unit']} worse on average (95 %)"
    return f"{worst}; {format_items(old['needed'])}" if old["verdict"] == "undecided" else worst


def _listed(names: Sequence[str], tasks: Mapping[str, Json]) -> str:
    """The largest changes; a sentence is no table."""
    largest = sorted(names, key=lambda name: -abs(_size(tasks[name])))[:NAMED]
    shown = ", ".join(f"{tasks[name]['title']} ({tasks[name]['said']})" for name in names if name in largest)
    return shown + _rest(names)


def _size(task: Json) -> float:
    """Of a change, in the margin's unit."""
    return 100 * task["difference"] / (max(task["before"], 1e-9) if task["metric"] == "loss" else 1)


def _rest(names: Sequence[str]) -> str:
    return f" and {len(names) - NAMED} more" if len(names) > NAMED else ""


def _number(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")
