"""The page of training: its curves, while it runs and afterwards."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlllm.charts import training_figures
from controlllm.decks.page import Page, Section, Table, Tile, percent, render
from controlllm.private import clean
from controlllm.progress import duration

Json = dict[str, Any]
METRICS = "metrics.jsonl"


def page(folder: Path, lineage: Json, places: Mapping[str, Path]) -> Page:
    """Of a training that is over."""
    rows, made = read_rows(folder), json.loads((folder / "train.json").read_text())
    share = percent(made["trained_parameters"] / max(made["total_parameters"], 1))
    tiles = [
        Tile("Steps", f"{made['steps']:,}", f"in {duration(made['seconds'])}"),
        Tile("Tokens", f"{made['tokens']:,}", f"{made['target_tokens']:,} learned"),
        Tile("Trained", f"{made['trained_parameters']:,}", f"{share} of {made['total_parameters']:,} parameters"),
        Tile("Processes", str(made.get("processes", 1)), str((made.get("environment") or {}).get("device", ""))),
        *_tiles(rows),
    ]
    return Page("train", "Training", tiles, _sections(rows, made.get("resumed", ())), made=lineage)


def live_page(folder: Path) -> str:
    """Of a training that runs in this folder, as HTML."""
    rows = read_rows(folder)
    step = max((row["step"] for row in rows), default=0)
    head = f"Training: step {step:,}" if rows else "Training has not made a step yet"
    return render(Page("train, while it runs", head, _tiles(rows), _sections(rows, ())))


def read_rows(folder: Path) -> list[Json]:
    """What was logged so far; the last line may be half-written while training goes on."""
    file = folder / METRICS
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def _tiles(rows: Sequence[Json]) -> list[Tile]:
    names = {
        "loss": "Loss",
        "validation_loss": "Held-out loss",
        "retention_loss": "Loss on old skills",
        "tokens_per_second": "Tokens per second",
        "memory_gb": "Memory, GB",
    }
    found = []
    for name, title in names.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            found.append(Tile(title, f"{values[-1]:.4g}", f"first {values[0]:.4g}"))
    return found


def _sections(rows: Sequence[Json], resumed: Sequence[int]) -> list[Section]:
    if not rows:
        return [Section("Curves", "Nothing was logged yet.")]
    note = "Bold is an average where single steps are noisy, faint is as logged."
    note += " Dotted upright lines: the run was taken up again." if resumed else ""
    last = next((row for row in reversed(rows) if "loss" in row), rows[-1])
    table = Table(["Of the last step", ""], [[name, _said(value)] for name, value in clean(last).items()])
    return [Section("Curves", note, figures=training_figures(rows, resumed)), Section("Numbers", tables=[table])]


def _said(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
