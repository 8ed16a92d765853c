"""A sequence of models, each trained on from the one before: what every stage did to every task.

`scores[i][j]` is R_ij of Lopez-Paz & Ranzato (2017): task j after stage i; stage 0 is the base model.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlllm.errors import UserError
from controlllm.statistics.pairs import NotComparableError, read_pairs, read_scores
from controlllm.statistics.words import margin_unit, unit_of

Json = dict[str, Any]
RESAMPLES = 2_000
SEED = 0
Measure = Callable[[NDArray, NDArray], NDArray]
"""From (stages, tasks, ...) and the stage at which each task was learned, (tasks,), to (...)."""


def compare_stages(folders: Sequence[Path], *, learned: Mapping[str, int] | None = None) -> Json:
    """Results of the base model and of each stage, in order.

    {"tasks": {name: {"title", "metric", "role", "learned_at", "scores": [...]}}, "transfer": {measure: {"value", "low",
    "high", "tasks", "unit"}}, "left_out"}. learned: stage of a task; else the first stage whose recipe names it `new`,
    and 0, the base model, for tasks that none does. Raises UserError where nothing compares.
    """
    scores = [read_scores(folder) for folder in folders]
    tasks, drawn, left_out = {}, [], {}
    for name in {name: None for each in scores for name in each["tasks"]}:
        if missing := [str(i) for i, each in enumerate(scores) if name not in each["tasks"]]:
            left_out[name] = f"was not measured at stage {', '.join(missing)}"
            continue
        about = scores[-1]["tasks"][name]
        if about["role"] == "drift":
            continue
        metric = next(iter(about["metrics"]))
        try:
            values, resampled = _resampled(folders, name, metric)
        except NotComparableError as error:
            left_out[name] = str(error)
            continue
        tasks[name] = {"title": about["title"], "role": about["role"], "metric": metric, "scores": values.tolist()}
        drawn.append(_in_units(metric, values, resampled))
    if not tasks:
        raise UserError(f"{folders[-1]} has no task that was measured at every stage: {left_out}")
    stage = np.array([_learned_at(name, scores, learned or {}) for name in tasks])
    for about, number in zip(tasks.values(), stage.tolist(), strict=True):
        about["learned_at"] = number
    metrics = [about["metric"] for about in tasks.values()]
    transfer = _transfer(np.stack(drawn, axis=1), stage, list(tasks), metrics)
    return {"tasks": tasks, "transfer": transfer, "left_out": left_out}


def average_score(scores: NDArray, learned: NDArray) -> NDArray:
    """Mean over tasks of R_Tj (Lopez-Paz & Ranzato 2017, ACC)."""
    return scores[-1].mean(axis=0)


def backward_transfer(scores: NDArray, learned: NDArray) -> NDArray:
    """Mean over tasks learned before the last stage of R_Tj - R_jj: below 0 they were forgotten (the same, BWT)."""
    return np.mean([scores[-1, j] - scores[at, j] for j, at in _before_last(scores, learned)], axis=0)


def forward_transfer(scores: NDArray, learned: NDArray) -> NDArray:
    """Mean over tasks learned from stage 2 on of R_(j-1)j - R_0j: what earlier stages brought them (the same, FWT).

    There the comparison is with random weights; here with the base model, which the first stage starts from.
    """
    return np.mean([scores[at - 1, j] - scores[0, j] for j, at in enumerate(learned.tolist()) if at > 1], axis=0)


def forgetting(scores: NDArray, learned: NDArray) -> NDArray:
    """Mean over tasks learned before the last stage of their best so far less R_Tj (Chaudhry et al. 2018); 0 or more is
    a loss. The best of several noisy scores is a little too good, so is the measure too high for few items."""
    return np.mean([scores[at:-1, j].max(axis=0) - scores[-1, j] for j, at in _before_last(scores, learned)], axis=0)


def base_transfer(scores: NDArray, learned: NDArray) -> NDArray:
    """Mean over tasks that no stage taught of R_Tj - R_0j: backward transfer on what the base model knew."""
    return np.mean([scores[-1, j] - scores[0, j] for j, at in enumerate(learned.tolist()) if at == 0], axis=0)


def _before_last(scores: NDArray, learned: NDArray) -> list[tuple[int, int]]:
    return [(j, at) for j, at in enumerate(learned.tolist()) if 0 < at < len(scores) - 1]


def _transfer(scores: NDArray, learned: NDArray, names: list[str], metrics: list[str]) -> Json:
    """scores: (stages, tasks, 1 + resamples), the first of them as measured."""
    last = len(scores) - 1
    applies: dict[str, tuple[Measure, NDArray]] = {
        "average score": (average_score, np.array([metric != "loss" for metric in metrics])),
        "backward transfer": (backward_transfer, (learned > 0) & (learned < last)),
        "forgetting": (forgetting, (learned > 0) & (learned < last)),
        "forward transfer": (forward_transfer, learned > 1),
        "base skills": (base_transfer, learned == 0),
    }
    found = {}
    for name, (measure, which) in applies.items():
        if which.any():
            values = measure(scores[:, which], learned[which])
            low, high = np.quantile(values[1:], (0.025, 0.975))
            used = [names[index] for index in np.flatnonzero(which)]
            unit = unit_of(metrics[index] for index in np.flatnonzero(which))
            found[name] = {"value": float(values[0]), "low": float(low), "high": float(high), "unit": unit}
            found[name] |= {"tasks": used}
    return found


def _resampled(folders: Sequence[Path], name: str, metric: str) -> tuple[NDArray, NDArray]:
    """Scores (stages,) as measured, and of resampled items, (stages, resamples): the same items at every stage."""
    pairs = read_pairs(folders, name)
    values = np.stack(pairs.values(metric), axis=1)  # (items, stages)
    weight = pairs.tokens if metric == "loss" else np.ones(len(values))
    clusters = pairs.clusters()
    if clusters is not None:
        weight = np.bincount(clusters, weights=weight)
        values = np.stack([np.bincount(clusters, weights=column) for column in values.T], axis=1)
    generator = np.random.default_rng([SEED, len(values)])
    counts = (generator.multinomial(len(values), np.full(len(values), 1 / len(values))) for _ in range(RESAMPLES))
    both = np.column_stack([values, weight])
    sums = np.stack([count @ both for count in counts])  # (resamples, stages + 1)
    return values.sum(axis=0) / weight.sum(), (sums[:, :-1] / sums[:, -1:]).T


def _in_units(metric: str, values: NDArray, resampled: NDArray) -> NDArray:
    """(stages, 1 + resamples) in points, or per cent of the base model's loss with up for better."""
    return margin_unit(metric, float(values[0])) * np.column_stack([values, resampled])


def _learned_at(name: str, scores: Sequence[Json], learned: Mapping[str, int]) -> int:
    if name in learned:
        return learned[name]
    news = [i for i, each in enumerate(scores) if i > 0 and each["tasks"][name]["role"] == "new"]
    return news[0] if news else 0
