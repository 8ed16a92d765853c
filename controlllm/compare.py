"""Results of models, found and shown: what was learned and forgotten, the items that flipped, and a run of stages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlllm.errors import UserError
from controlllm.statistics import MIN_ITEMS, format_items, format_p, format_range, format_signed, format_value

Json = dict[str, Any]
COLOURS = {"learned": "green", "kept": "green", "forgot": "red"}
SHOWN = 8
"""Flipped items of each kind."""
LENGTH = 400
"""Characters shown of a text."""


def find_scores(place: Path) -> Path:
    """The folder with the scores.json of a folder of results, of a run, or of a checkpoint that was measured.

    Raises UserError, one line that says how to measure it.
    """
    for folder in (place, place / "scores"):
        if (folder / "scores.json").is_file():
            return folder
    if not place.is_dir():
        raise UserError(f"{place}: no such folder; give results, a run's folder, or a checkpoint that was measured")
    if not (place / "config.json").is_file():
        raise UserError(f"{place}: has neither scores.json nor a model; give results, or measure a checkpoint first")
    from controlllm.benchmark.measured import HOME
    from controlllm.statistics import read_scores
    from controlllm.store import content_hash

    content = content_hash(place.resolve())
    beside = place.absolute().parent / "scores"
    if (beside / "scores.json").is_file() and read_scores(beside).get("checkpoint") == content:
        return beside
    for folder in sorted(HOME.glob(f"*-{content[:8]}")):
        if read_scores(folder).get("checkpoint") == content:
            return folder
    raise UserError(
        f"{place}: was not measured yet; run controlllm benchmark {place} --suite offline (or other suites)"
    )


def comparison_table(comparison: Json, title: str) -> Any:
    """A row per task, the suites' means below them."""
    from rich.table import Table
    from rich.text import Text

    table = Table("task", title=Text(title), title_justify="left", show_edge=False)
    for column in ("before\nafter", "difference\n(95 %)", "won\nlost", "p\nadjusted"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    tasks = comparison["tasks"]
    for role in ("new", "old", "drift"):
        for task in (each for each in tasks.values() if each["role"] == role):
            table.add_row(*_cells(task, role))
    for suite in comparison["suites"].values():
        table.add_row(*_cells(suite | {"gained": None}, "mean"), style="italic")
    for name, why in comparison["left_out"].items():
        table.add_row(Text(name), "", "", "", "", Text(f"not compared: {why}", style="yellow"))
    return table


def stages_table(stages: Json, names: Sequence[str]) -> Any:
    """Tasks by stages; in bold where a task was learned."""
    from rich.table import Table
    from rich.text import Text

    table = Table("task", title="score after each stage", title_justify="left", show_edge=False)
    for name in names:
        table.add_column(Text(name), justify="right")
    for task in stages["tasks"].values():
        cells = (format_value(score, task["metric"]) for score in task["scores"])
        marks = ("bold" if number == task["learned_at"] else "" for number in range(len(names)))
        table.add_row(Text(task["title"]), *(Text(*pair) for pair in zip(cells, marks, strict=True)))
    return table


def transfer_table(stages: Json) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("", show_edge=False)
    for column in ("mean", "95 %"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    table.add_column("tasks")
    for name, found in stages["transfer"].items():
        value, low, high = (f"{found[key]:+.1f}".replace("-", "−") for key in ("value", "low", "high"))
        titles = ", ".join(stages["tasks"][task]["title"] for task in found["tasks"])
        table.add_row(name, value, f"{low} to {high}", found["unit"], Text(titles))
    return table


def flips_table(before: Path, after: Path, task: str) -> Any:
    """Items that were won or lost, spread evenly over each kind; of losses those that changed most, each way."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "", "item", title=Text(f"{task}: what flipped"), title_justify="left", show_edge=False, show_lines=True
    )
    for column in ("prompt", "target", "before", "after"):
        table.add_column(column, overflow="fold", ratio=2)
    for word, pairs, total in _flipped(before, after, task):
        for one, other in pairs:
            texts = (one["prompt"], one["target"], _answer(one), _answer(other))
            number = f"{other['subtask']} {other['id']}" if other["subtask"] not in (None, task) else str(other["id"])
            row = (Text(f"{word} ({total})", style="green" if word in ("won", "better") else "red"), Text(number))
            table.add_row(*row, *(Text(shorten(text)) for text in texts))
    return table


def shorten(text: str | None) -> str:
    """The end of a text, where the question is; what a terminal would obey, or lines, as spaces."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text or "").split())
    return plain if len(plain) <= LENGTH else f"… {plain[-LENGTH:]}"


def to_html(parts: Sequence[Any], title: str) -> str:
    """One page that needs nothing from elsewhere; every text is escaped."""
    import io

    from rich.console import Console

    page = Console(record=True, file=io.StringIO(), width=170, highlight=False, force_terminal=True)
    page.print(title, markup=False, style="bold")
    for part in parts:
        page.print(part, markup=False)
        page.print()
    return page.export_html(inline_styles=True)


def _cells(task: Mapping[str, Any], role: str) -> list[Any]:
    """Two lines each: a terminal of 80 columns shows every number whole."""
    from rich.text import Text

    metric = task["metric"]
    title = Text(task["title"]).append(f"\n{role} · {task['items']:,} items", style="dim")
    difference = f"{format_signed(task['difference'], metric)}\n({format_range(task['low'], task['high'], metric)})"
    flips = "" if task["gained"] is None else f"{task['gained']}\n{task['lost']}"
    values = "\n".join(format_value(task[end], metric) for end in ("before", "after"))
    p = "" if task["verdict"] == "drifted" else format_p(task["p_adjusted"]).removeprefix("p ").removeprefix("= ")
    verdict = Text(_verdict(task), style=COLOURS.get(task["verdict"], "yellow"))
    return [title, values, difference, flips, p, verdict]


def _verdict(task: Mapping[str, Any]) -> str:
    """With what the other columns do not say."""
    if task["verdict"] == "undecided":
        few = task["items"] < MIN_ITEMS
        return f"undecided: {f'needs {MIN_ITEMS} items' if few else format_items(task['needed'])}"
    return f"{task['verdict']} (surely worse, within the margin)" if task.get("slipped") else task["verdict"]


def _flipped(before: Path, after: Path, task: str) -> list[tuple[str, list[tuple[Json, Json]], int]]:
    from controlllm.benchmark.items import read_items

    def order(row: Json) -> tuple[str, int]:
        return row["subtask"] or "", row["id"]

    rows = [sorted(read_items(folder, task), key=order) for folder in (before, after)]
    if [order(row) for row in rows[0]] != [order(row) for row in rows[1]]:
        raise UserError(f"{task}: {after} has other items than {before}: measure both alike")
    pairs = list(zip(*rows, strict=True))
    if all(one["correct"] is not None and other["correct"] is not None for one, other in pairs):
        kinds = {"lost": (True, False), "won": (False, True)}
        found = {word: [p for p in pairs if (p[0]["correct"], p[1]["correct"]) == ends] for word, ends in kinds.items()}
        return [(word, _spread(flipped), len(flipped)) for word, flipped in found.items()]
    ranked = sorted(pairs, key=lambda pair: _rise(*pair))
    worse = [pair for pair in ranked if _rise(*pair) < 0]
    better = [pair for pair in reversed(ranked) if _rise(*pair) > 0]
    return [("worse", worse[:SHOWN], len(worse)), ("better", better[:SHOWN], len(better))]


def _rise(one: Json, other: Json) -> float:
    if one["score"] is not None and other["score"] is not None:
        return other["score"] - one["score"]
    return (one["loss"] - other["loss"]) / max(one["tokens"], 1)


def _spread(pairs: list[tuple[Json, Json]]) -> list[tuple[Json, Json]]:
    count = min(SHOWN, len(pairs))
    return [pairs[index * len(pairs) // count] for index in range(count)]


def _answer(row: Json) -> str:
    if row["output"] is not None:
        return row["output"]
    return "" if row["loss"] is None else f"{row['loss'] / max(row['tokens'], 1):.3f} nats/token"
