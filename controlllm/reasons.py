"""Why a stage computes: which of its inputs differ from those of an output that was made before."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from controlllm.changes import nearest, told
from controlllm.ledger import FOLDER, VARIABLE, Ledger
from controlllm.output import find_lineage, store_root

Json = dict[str, Any]


def ledger() -> Ledger:
    """Where the lineage of every output is written down, too."""
    return Ledger(os.environ.get(VARIABLE) or str(store_root() / FOLDER))


def why(home: Path, stage: str, key: str, inputs: Json) -> str:
    """Which inputs differ from those of the stored output, or the one written down, that is nearest to them."""
    book = ledger()
    stored = [lineage for _, lineage in stored_in(home)]
    known = [*stored, *([] if stored and not book.is_shared else book.of(stage))]
    if any(lineage["key"] == key for lineage in known) or book.find(stage, key):
        is_here = any(lineage["key"] == key for lineage in stored)
        return "the stored output was damaged" if is_here else "its stored output is not here any more"
    others = [lineage["inputs"] for lineage in known]
    if other := nearest(inputs, others):
        return told(other, inputs) or "the stored output was damaged"
    if "FLYTE_INTERNAL_EXECUTION_ID" in os.environ and not book.is_shared:
        return f"first time on this machine; what is other than in earlier executions is not known without {VARIABLE}"
    return "first time"


def stored_in(home: Path) -> Iterator[tuple[Path, Json]]:
    """A stage's outputs and their lineages."""
    for folder in sorted(home.iterdir()):
        if not folder.name.startswith(".") and (lineage := find_lineage(folder)):
            yield folder, lineage
