"""Two results of a benchmark, task by task: what was learned, kept and forgotten, and what may be said of all."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlllm.errors import UserError
from controlllm.statistics.change import Change, compare_hits, compare_losses, compare_scores_of_items
from controlllm.statistics.pairs import VALUE, NotComparableError, Pairs, read_pairs, read_scores
from controlllm.statistics.pooled import Compared, Pool, judge_pool, overall, pool, suite_means
from controlllm.statistics.significance import holm
from controlllm.statistics.verdict import MIN_ITEMS, amount, describe_drift, is_surely_worse, judge

Json = dict[str, Any]


def compare_scores(before: Path, after: Path, *, margin: float = 2.0) -> Json:
    """Compare the results in two folders; a task that cannot be compared stands under `left_out`, with the reason.

    {"tasks", "suites", "pools", "overall", "left_out", "margin", "models"}, ready for JSON (docs/statistics.md). Raises
    UserError where nothing can be compared, or the items are not those that scores.json speaks of.
    """
    scores = [read_scores(folder) for folder in (before, after)]
    found: dict[str, tuple[Json, Pairs, dict[str, Change]]] = {}
    left_out = _unmeasured(*scores)
    for name, task in scores[1]["tasks"].items():
        if name in left_out:
            continue
        try:
            pairs = read_pairs([before, after], name)
            changes, unsaid = _changes(_metrics(*(each["tasks"][name] for each in scores)), pairs)
        except NotComparableError as error:
            left_out[name] = str(error)
            continue
        for each, end in zip(scores, ("before", "after"), strict=True):
            _check(name, each["tasks"][name], changes, end)
        found[name] = task | {"left_out": unsaid}, pairs, changes
    if not found:
        name, why = list(left_out.items())[-1] if left_out else ("neither", "has a task")  # the last was compared
        raise UserError(f"{after} has nothing that compares with {before}: {name}: {why}")
    result = judge_all(found, margin)
    models = [{"model": each.get("model"), "checkpoint": each.get("checkpoint")} for each in scores]
    return result | {"left_out": left_out, "margin": margin, "models": models}


def compare_metric(metric: Any, pairs: Pairs) -> Change:
    """One metric of one task. Raises NotComparableError."""
    before, after = pairs.values(metric)
    if metric == "loss":
        if (pairs.tokens < 1).any():
            raise NotComparableError("some of its items have no token with a loss")
        return compare_losses(before, after, pairs.tokens, pairs.clusters())
    if metric == "score":
        return compare_scores_of_items(before, after, pairs.clusters())
    return compare_hits(metric, before, after, pairs.clusters())


def judge_all(found: Mapping[str, tuple[Json, Pairs, dict[str, Change]]], margin: float) -> Json:
    """Verdicts on tasks, suites, all old and all new skills as one family of tests; found: what scores.json says of a
    task, its items, and the changes of its metrics, the primary one first."""
    compared = {}
    for name, (task, pairs, changes) in found.items():
        change = next(iter(changes.values()))
        if task["role"] != "drift" and change.items >= MIN_ITEMS:
            compared[name] = Compared(task["suite"], task["role"], change, _flips(change, pairs))
    pools = _pools(compared)
    adjusted = _adjusted(compared, pools)
    tasks = {
        name: _task(task, changes, adjusted.get(frozenset([name]), 1.0), margin, tests=len(adjusted))
        for name, (task, _, changes) in found.items()
    }
    judged = {
        key: judge_pool(each, p_adjusted=adjusted[frozenset(each.tasks)], margin=margin) for key, each in pools.items()
    }
    suites = suite_means(tasks, judged)
    return {"tasks": tasks, "suites": suites, "pools": judged, "overall": overall(tasks, suites, judged)}


def _unmeasured(before: Json, after: Json) -> dict[str, str]:
    reasons = {}
    for name in {**before["tasks"], **after["tasks"], **before.get("failed", {}), **after.get("failed", {})}:
        for scores, end in ((before, "before"), (after, "after")):
            if name in scores.get("failed", {}):
                reasons[name] = f"failed {end}: {scores['failed'][name]}"
            elif name not in scores["tasks"]:
                reasons.setdefault(name, f"was not measured {end}")
    return reasons


def _metrics(before: Json, after: Json) -> list[str]:
    """Those of the second model, the primary one first. A score between 0 and 1 on one side makes both scores."""
    names = list(after["metrics"])
    if "score" in {*before["metrics"], *names}:
        names = ["loss" if name == "loss" else "score" for name in names]
    return names


def _changes(metrics: Sequence[str], pairs: Pairs) -> tuple[dict[str, Change], dict[str, str]]:
    """Of every metric that compares; and why the others do not."""
    changes, unsaid = {}, {}
    for metric in metrics:
        if metric not in VALUE:
            unsaid[metric] = f"its metric '{metric}' is none of {', '.join(VALUE)}"
            continue
        try:
            changes[metric] = compare_metric(metric, pairs)
        except NotComparableError as error:
            unsaid[metric] = str(error)
    if not changes:
        raise NotComparableError(next(iter(unsaid.values()), "it has no metric"))
    return changes, unsaid


def _check(name: str, task: Json, changes: Mapping[str, Change], end: str) -> None:
    for metric, change in changes.items():
        shares = [share for name, share in task["metrics"].items() if name != "loss"]
        said = task["metrics"].get(metric, shares[0] if metric == "score" and shares else None)
        value = getattr(change, end)
        if said is None or not math.isclose(said, value, rel_tol=1e-3, abs_tol=1e-3):
            raise UserError(f"{name}: {metric} {end} is {said} in scores.json, {value:.5f} by its items")


def _pools(compared: Mapping[str, Compared]) -> dict[str, Pool]:
    """All old skills, all new ones, and every suite that is of one side."""
    groups: dict[str, dict[str, Compared]] = {}
    for name, task in compared.items():
        for key in (task.role, task.suite):
            groups.setdefault(key, {})[name] = task
    return {key: pool(group) for key, group in groups.items() if len({task.role for task in group.values()}) == 1}


def _adjusted(compared: Mapping[str, Compared], pools: Mapping[str, Pool]) -> dict[frozenset[str], float]:
    """p by the tasks it is about, after Holm over all: in 5 % of comparisons, at most, is there any false alarm."""
    p = {frozenset([name]): task.change.p for name, task in compared.items()}
    p |= {frozenset(each.tasks): each.p for each in pools.values() if len(each.tasks) > 1}
    return dict(zip(p, holm(list(p.values())), strict=True))


def _task(task: Json, changes: Mapping[str, Change], p_adjusted: float, margin: float, *, tests: int) -> Json:
    change = next(iter(changes.values()))
    about = {key: task[key] for key in ("title", "suite", "kind", "role", "left_out")}
    numbers = asdict(change)
    if task["role"] == "drift":
        words: Json = {"verdict": "drifted", "detail": describe_drift(change), "needed": None, "slipped": False}
        p_adjusted = change.p
    else:
        judged = judge(change, p_adjusted=p_adjusted, margin=margin, tests=tests)
        slipped = judged.verdict == "kept" and is_surely_worse(change.improvement[2], p_adjusted)
        words = asdict(judged) | {"slipped": slipped}
    words |= {"said": amount(change.difference, change), "p_adjusted": p_adjusted}
    metrics = {metric: asdict(each) for metric, each in changes.items()}
    return about | numbers | {"tokens": task.get("tokens", 0)} | words | {"metrics": metrics}


def _flips(change: Change, pairs: Pairs) -> NDArray:
    """What each question adds to the difference, in the margin's unit."""
    before, after = pairs.values(change.metric)
    clusters = pairs.clusters()
    difference = after - before if clusters is None else np.bincount(clusters, weights=after - before)
    total = pairs.tokens.sum() if change.metric == "loss" else len(before)
    return difference / total * change.unit
