"""The page of the gate: every limit of the recipe, what was measured, and what follows for the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlllm.decks.page import Page, Section, Table, Tile
from controlllm.gate import Breach, breaches
from controlllm.statistics import compare_scores

Json = dict[str, Any]


def page(benchmark: Mapping[str, Any], base_scores: Path, tuned_scores: Path, model: Json) -> Page:
    """benchmark: the recipe's section, of which gate and margin count. model: its lineage."""
    comparison = compare_scores(base_scores, tuned_scores, margin=benchmark["margin"])
    gate = benchmark.get("gate") or {}
    broken = {breach.name: breach for breach in breaches(comparison, gate)}
    rows = [_row(name, limit, broken) for name, limit in gate.items()]
    extra = [_row(breach.name, breach.limit, broken) for breach in broken.values() if breach.name not in gate]
    table = Table(["Skill", "Limit", "Held", "What was measured"], [*rows, *extra], numbers=["Limit"])
    note = "" if gate else "The recipe has no benchmark.gate: every model is promoted."
    counts = comparison["overall"]
    headline = "The model is not promoted." if broken else "The model is promoted."
    tiles = [Tile("Limits", str(len(gate))), Tile("Not held", str(len(broken))), Tile("Overall", counts["verdict"])]
    sections = [Section("Limits", note, tables=[table] if gate else []), Section("In a sentence", counts["sentence"])]
    return Page("gate", "The gate's decision", tiles, sections, headline, "failed" if broken else "passed", model)


def _row(name: str, limit: float, broken: Mapping[str, Breach]) -> list[str]:
    breach = broken.get(name)
    return [name, f"{limit:g}", "no" if breach else "yes", breach.message if breach else "within the limit"]
