"""The page of the dial; the probe draws its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlllm.decks.page import Page, Section, Table, Tile
from controlllm.report.dial import dial_facts
from controlllm.statistics import MEASURES

Json = dict[str, Any]
SIGNS = {"learned": "▲", "kept": "✓", "forgot": "✗", "undecided": "?", "drifted": "↔"}


def dial_page(folder: Path, lineage: Json, places: Mapping[str, Path]) -> Page:
    """What each alpha scale brings and costs."""
    facts = dial_facts(folder / "dial.json")
    rows = [
        [row["title"], row["role"], MEASURES[row["metric"]],
         *(f"{cell['text']} {SIGNS.get(cell['verdict'], '')} {cell['verdict']}" for cell in row["cells"])]
        for row in facts["rows"]
    ]  # fmt: skip
    columns = ["Skill", "Side", "Measure", *facts["scales"]]
    table = Table(columns, rows, "Verdicts are against the base model.", facts["scales"])
    note = "0 is the base model, 1 the trained one."
    sections = [Section("Trade-off", note, figures=facts["figures"]), Section("Values", tables=[table])]
    return Page("dial", "The dial", [Tile("Alpha scales", ", ".join(facts["scales"]))], sections, made=lineage)
