"""The table in docs/equalities.md is what comes out when its combinations are run."""

import os
import re
from pathlib import Path

import pytest
from equalities import BOUND, SHOWN, STRATEGIES, TRAINERS, cells, measure, refusal, table

pytestmark = pytest.mark.distributed
DOCS = Path(__file__).parents[2] / "docs" / "equalities.md"
MADE = "<!-- made by tests/distributed/test_equalities.py -->\n"


def written():
    """The table's cells by (trainer, sharing, method as shown), and its notes by number."""
    text = DOCS.read_text().split(MADE)[1]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    named = {(row[0], method): cell for row in rows for method, cell in zip(head[1:], row[1:], strict=True)}
    return named, dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))


def test_all_that_is_refused_is_refused_with_that_line(recipe):
    named, notes = written()
    assert len(named) == len(TRAINERS) * len(STRATEGIES) * len(SHOWN)
    for cell in cells(tuple(SHOWN)):
        there = named[f"{cell.trainer}, {cell.strategy}", SHOWN[cell.method]]
        line = refusal(recipe, cell)
        assert (notes[there.strip("[]")] if there.startswith("[") else None) == line, cell


def test_control_is_equal_everywhere(tiny_base, recipe, tmp_path):
    found = measure(tiny_base, recipe, tmp_path, ("control",))
    assert {cell.name: apart for cell, apart in found.apart.items() if apart > BOUND} == {}
    named, _ = written()
    assert all(named[f"{cell.trainer}, {cell.strategy}", SHOWN[cell.method]] == "=" for cell in found.apart)


@pytest.mark.slow
def test_all_methods_are_what_the_table_says(tiny_base, recipe, tmp_path):
    made = table(measure(tiny_base, recipe, tmp_path, tuple(SHOWN)))
    if os.environ.get("WRITE_DOCS"):
        DOCS.write_text(DOCS.read_text().split(MADE)[0] + MADE + "\n" + made + "\n")
    assert DOCS.read_text().split(MADE)[1].strip() == made
