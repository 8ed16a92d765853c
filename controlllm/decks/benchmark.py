"""The pages of a benchmark: scores task by task, and what a single task asked and got."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlllm.decks.page import Page, Section, Table, Tile
from controlllm.private import clean
from controlllm.progress import duration
from controlllm.statistics import MEASURES, format_value

Json = dict[str, Any]
SAMPLES = 6
"""Items of a task that are shown."""
RIGHT = ("exact_match", "accuracy", "pass")
"""Measures that are shares of right answers."""


def page(folder: Path, lineage: Json, places: Mapping[str, Path]) -> Page:
    """Of a model on every task."""
    scores = json.loads((folder / "scores.json").read_text())
    tasks, failed = scores["tasks"], scores["failed"]
    columns = ["Task", "Suite", "Side", "Measure", "Value", "95 %", "Items", "Backend", "Time"]
    rows = [row for name, task in tasks.items() for row in _rows(folder / "items" / f"{name}.parquet", task)]
    sections = [Section("Scores", tables=[Table(columns, rows, numbers=["Value", "95 %", "Items", "Time"])])]
    if failed:
        wrong = [[name, str(clean(said))] for name, said in failed.items()]
        sections.append(Section("Failed", tables=[Table(["Task", "Why"], wrong)]))
    tiles = [Tile("Tasks", str(len(tasks)), f"{len(failed)} failed" if failed else "none failed")]
    tiles += [Tile("Items", f"{sum(task['items'] for task in tasks.values()):,}")]
    tiles += [Tile("Measuring took", duration(scores["seconds"])), Tile("Model", scores["model"], scores["checkpoint"])]
    headline = f"{len(failed)} of {len(tasks) + len(failed)} tasks failed" if failed else ""
    return Page("benchmark", "Scores", tiles, sections, headline, "failed" if failed else "", lineage)


def task_page(folder: Path, lineage: Json, places: Mapping[str, Path]) -> Page:
    """Of one task: its measures, and items with the model's answers, evenly spread."""
    task = json.loads((folder / "task.json").read_text())
    rows = _rows(folder / "items.parquet", task | {"role": "–"})
    columns = ["Task", "Suite", "Side", "Measure", "Value", "95 %", "Items", "Backend", "Time"]
    table = Table(columns, rows, numbers=["Value", "95 %", "Items", "Time"])
    sections = [Section("Measures", tables=[table]), _items(folder / "items.parquet")]
    return Page("benchmark task", task["title"], [], sections, made=lineage)


def _rows(items: Path, task: Json) -> list[list[str]]:
    found = []
    for number, (metric, value) in enumerate(task["metrics"].items()):
        first = [task["title"], task["suite"], task["role"]] if number == 0 else ["", "", ""]
        last = [f"{task['items']:,}", task["backend"], duration(task["seconds"])] if number == 0 else ["", "", ""]
        measure = MEASURES.get(metric, metric)
        found.append([*first, measure, format_value(value, metric), _interval(items, metric), *last])
    return found


def _interval(items: Path, metric: str) -> str:
    """Wilson's, of a share of right answers; how sure a change is, the report says."""
    import pyarrow.parquet as pq
    from scipy.stats import binomtest

    if metric not in RIGHT:
        return "–"
    right = [value for value in pq.read_table(items, columns=["correct"])["correct"].to_pylist() if value is not None]
    if not right:
        return "–"
    interval = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    return f"{format_value(interval.low, metric)} to {format_value(interval.high, metric)}"


def _items(file: Path) -> Section:
    import pyarrow.parquet as pq

    rows = pq.read_table(file).to_pylist()
    spread = [rows[number * len(rows) // SAMPLES] for number in range(min(SAMPLES, len(rows)))]
    texts = [(f"item {row['id']}", _told(row)) for row in spread]
    return Section("Items", f"{len(texts)} of {len(rows):,}, evenly spread.", texts=texts)


def _told(row: Json) -> str:
    names = ("prompt", "target", "output", "correct", "score", "loss")
    return "\n".join(f"{name}: {row[name]}" for name in names if row.get(name) is not None)
