"""The page of prepare: how long documents are, what of them is learned, what was left out and why, padding."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlllm.charts import bars
from controlllm.data.shelf import Shelf
from controlllm.decks.page import Page, Section, Table, Tile, percent
from controlllm.preview import Shown, documents_of
from controlllm.private import clean
from controlllm.report.facts import data_facts

Json = dict[str, Any]
ROWS = 3
"""Packed rows of each dataset that are shown."""


def page(folder: Path, lineage: Json, places: Mapping[str, Path]) -> Page:
    """Of all datasets; with `pack.streaming` only the plan."""
    if not (folder / "stats.json").is_file():
        plan = json.loads((folder / "plan.json").read_text())
        rows = [[one["name"], json.dumps(clean(one), ensure_ascii=False)] for one in plan]
        table = Table(["Dataset", "As the recipe has it"], rows)
        note = "pack.streaming: training makes the shards while it runs, and counts them in its own output."
        return Page("prepare", "The plan of the data", [], [Section("Datasets", note, tables=[table])], made=lineage)
    facts = data_facts(json.loads((folder / "stats.json").read_text()), {}, folder / "quarantine.jsonl")
    names = [one["name"] for one in facts["datasets"]]
    sections = [_lengths(facts), _counts(facts)]
    sections += [_beginning(folder / name, name, places) for name in names]
    return Page("prepare", "Packed rows", _tiles(facts), sections, made=lineage)


def piece_page(folder: Path, lineage: Json, places: Mapping[str, Path]) -> Page:
    """Of some units of one dataset, which one pod made."""
    index = json.loads((folder / "index.json").read_text())
    made = [unit["files"].get("train", {}) for unit in index["units"]]
    rows = [[unit["key"], f"{unit['rows']:,}", f"{one.get('documents', 0):,}", f"{one.get('tokens', 0):,}"]
            for unit, one in zip(index["units"], made, strict=True)]  # fmt: skip
    table = Table(["Shard", "Rows", "Documents", "Tokens"], rows, numbers=["Rows", "Documents", "Tokens"])
    tiles = [Tile("Shards", f"{len(rows):,}"), Tile("Tokens", f"{sum(one.get('tokens', 0) for one in made):,}")]
    sections = [Section("Shards", tables=[table]), _beginning(folder, index["name"], places)]
    return Page("prepare piece", index["name"], tiles, sections, made=lineage)


def _tiles(facts: Json) -> list[Tile]:
    left = facts["filtered_rows"] + facts["bad_rows"]
    return [
        Tile("Rows read", f"{facts['rows']:,}", f"{left:,} left out, {percent(left / max(facts['rows'], 1))}"),
        Tile("Documents", f"{facts['documents']:,}", f"in {facts['packed_rows']:,} packed rows"),
        Tile("Tokens", f"{facts['tokens']:,}"),
        Tile("Learned from", percent(facts["target_tokens"] / max(facts["tokens"], 1)), "the rest is masked"),
        Tile("Padding", f"{100 * facts['padding']:.2f} %", "of the rows' room stays empty"),
        Tile("Held back", f"{facts['validation_documents']:,}", "documents for validation"),
    ]


def _lengths(facts: Json) -> Section:
    """lengths: documents by the power of two that they do not reach."""
    figures = []
    for one in facts["datasets"]:
        counts = sorted((int(length), count) for length, count in one["lengths"].items())
        drawn = [(f"< {length:,}", count) for length, count in counts]
        figures.append(bars(f"Documents of {one['name']} by tokens", drawn, "tokens", "documents"))
    return Section("Lengths", figures=figures)


def _counts(facts: Json) -> Section:
    columns = ["Dataset", "Rows", "Left out, and why", "Documents", "Tokens", "Learned", "Padding"]
    rows = []
    for one in facts["datasets"]:
        why = "; ".join(f"{count:,} {reason}" for reason, count in (one["left_out"] | one["cut"]).items())
        learned = percent(one["target_tokens"] / max(one["tokens"], 1))
        rows.append([one["name"], f"{one['rows']:,}", why or "none", f"{one['documents']:,}", f"{one['tokens']:,}",
                     learned, percent(one["padding"])])  # fmt: skip
    bad = [[reason, f"{count:,}"] for reason, count in facts["bad"]]
    tables = [Table(columns, rows, numbers=[c for c in columns[1:] if not c.startswith("Left")])]
    tables += [Table(["Rows in quarantine because of", "Rows"], bad, numbers=["Rows"])] if bad else []
    return Section("What was left out", tables=tables)


def _beginning(folder: Path, name: str, places: Mapping[str, Path]) -> Section:
    """The first packed rows, token by token; they need the base model's tokenizer."""
    title = f"First packed rows of {name}"
    if (base := places.get("ingest model")) is None:
        return Section(title, "Not shown: the base model's folder, which has the tokenizer, is not here.")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    shelf = Shelf.open(folder)
    spots = [(unit, row) for unit in range(shelf.units) for row in range(min(shelf.rows_of(unit), ROWS))][:ROWS]
    shown: list[Shown] = []
    for unit, row in spots:
        shown += documents_of(shelf, unit, row, tokenizer)
    note = "Coloured is learned, grey is context, boxes are special tokens. Documents of one row never see each other."
    return Section(title, note, documents=shown[:12])
