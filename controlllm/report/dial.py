"""The dial's trade-off: what each alpha scale lets through of the new skills, and what it costs of the old ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controlllm.charts import DASHED, SOLID, Figure, Series, curves, scatter_path
from controlllm.report.forest import better, unit_of
from controlllm.report.read import read_json
from controlllm.statistics import format_value

Json = dict[str, Any]
UNITS = {"points": "points of right answers", "per cent": "per cent of the base’s loss", "nats": "nats per token"}

LINES = 6
"""Colours for old skills in the style sheet."""


def dial_facts(file: Path) -> Json:
    """{"figures", "scales", "rows": a task each with its value at every scale} of a dial.json."""
    points = read_json(file)["points"]
    scales = [point["alpha_scale"] for point in points]
    tasks = points[-1]["probes"]
    rows = []
    for role in ("new", "old", "drift"):
        for name, task in tasks.items():
            if task["role"] == role:
                cells = [point["probes"][name] for point in points]
                shown = [{"text": format_value(c["after"], c["metric"]), "verdict": c["verdict"]} for c in cells]
                rows.append({"title": task["title"], "role": role, "metric": task["metric"], "cells": shown})
    return {"figures": _figures(points), "scales": [f"{scale:g}" for scale in scales], "rows": rows}


def _figures(points: Sequence[Json]) -> list[Figure]:
    figures = []
    (new, new_unit), (old, old_unit) = _means(points, "new"), _means(points, "old")
    if new and old:
        way = [(o, n, f"{point['alpha_scale']:g}") for point, n, o in zip(points, new, old, strict=True)]
        x, y = f"old skills, {UNITS[old_unit]}", f"new skills, {UNITS[new_unit]}"
        caption = "The numbers are alpha scales: 0 is the base model, 1 the trained one. Up and to the right is better."
        figures.append(scatter_path("What each alpha scale brings and costs, means", way, x, y, caption))
    for unit in UNITS:
        series = [one for role in ("new", "old") for one in _courses(points, role, unit)]
        if series:
            caption = f"Change against the base in {UNITS[unit]}, upwards is better."
            figures.append(curves(f"Over the alpha scale: {UNITS[unit]}", series, caption, axis="alpha scale"))
    return figures


def _means(points: Sequence[Json], role: str) -> tuple[list[float], str]:
    """Over the role's tasks that have right answers, or where none has, over those with a loss."""
    tasks = {name: task for name, task in points[-1]["probes"].items() if task["role"] == role}
    unit = "points" if any(unit_of(task) == "points" for task in tasks.values()) else "per cent"
    names = [name for name, task in tasks.items() if unit_of(task) == unit]
    if not names:
        return [], unit
    return [sum(better(p["probes"][name], "difference") for name in names) / len(names) for p in points], unit


def _courses(points: Sequence[Json], role: str, unit: str) -> list[Series]:
    tasks = {n: t for n, t in points[-1]["probes"].items() if t["role"] == role and unit_of(t) == unit}
    found = []
    for number, (name, task) in enumerate(tasks.items()):
        course = [(point["alpha_scale"], better(point["probes"][name], "difference")) for point in points]
        colour = "var(--accent)" if role == "new" else f"var(--line-{number % LINES})"
        found.append(Series(task["title"], course, colour, SOLID if role == "new" else DASHED))
    return found
