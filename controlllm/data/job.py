"""One unit of a source to one shard: read, filter, render, tokenise, pack, write."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from controlllm.config import DatasetConfig, PackConfig
from controlllm.data.catalog import find_dataset
from controlllm.data.documents import documents as read_documents
from controlllm.data.documents import take
from controlllm.data.filling import Filling
from controlllm.data.held_out import HeldOut
from controlllm.data.keys import content_keys, in_share
from controlllm.data.manifest import read_unit, unit_hash
from controlllm.data.render import Renderer
from controlllm.data.shard import Facts
from controlllm.data.steps import build_steps, step_fingerprint
from controlllm.data.types import BadRow, Documents, RowBatch, Stamp, Unit
from controlllm.fingerprint import PACKAGE, content_of, source_hash

CODE = (
    *("columns", "content_use", "decontaminate", "documents", "formats", "forms", "job", "keys", "lines", "messages"),
    *(
        "pack",
        "parquet",
        "plan",
        "render",
        "separated",
        "shard",
        "template",
        "tighten",
        "tokenize",
        "types",
        "units",
        "writer",
    ),
    "written",
)
# What of the pack section changes no token of a shard.
NOT_IN_KEY = {"streaming", "max_bad_rows", "unit_rows", "tokenizer", "chat_template"}


@dataclass
class Job:
    """All that determines a dataset's shards, and all that a worker process needs to make them."""

    dataset: DatasetConfig
    where: str
    """The dataset's place in the recipe, for errors: `mix.datasets.0`."""
    pack: PackConfig
    renderer: Renderer
    held_out: HeldOut | None
    stamps: dict[str, Stamp]
    duplicates: dict[int, np.ndarray] = field(default_factory=dict)
    """Row numbers to leave out, by the unit's place: equal documents stand before them."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("reader", "steps")}

    tokenizer: str = ""
    """Hash of the tokenizer and its chat template."""
    vocabulary: int = 0

    @cached_property
    def reader(self) -> Any:
        return find_dataset(self.dataset)

    @cached_property
    def steps(self) -> Any:
        return build_steps(self.dataset.preprocess, where=f"{self.where}.preprocess")

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What decides the tokens, beside the unit's own bytes, under readable names."""
        return {
            "dataset": step_fingerprint(self.steps, self.reader),
            "fraction": self.dataset.fraction,
            "pack": self.pack.model_dump(exclude=NOT_IN_KEY),
            "tokenizer": self.tokenizer,
            "held out": self.held_out.fingerprint if self.held_out else None,
            "code": {name: source_hash(PACKAGE / "data" / f"{name}.py") for name in CODE},
        }

    def unit_inputs(self, number: int, unit: Unit) -> dict[str, Any]:
        """Everything that can change a token of this unit's shard."""
        dropped = self.duplicates.get(number)
        repeated = content_of(dropped.tolist()) if dropped is not None and len(dropped) else None
        return self.inputs | {"rows": unit_hash(unit), "row limit": unit.rows, "repeated rows": repeated}

    def documents(self, batch: RowBatch) -> tuple[Documents, list[BadRow], Counter[str]]:
        """Documents of the rows that stay, before repeated ones are left out."""
        documents, bad, filtered = read_documents(self.reader, batch, self.steps)  # len(batch) in all
        counts = Counter(filtered)
        keep = np.ones(len(documents), bool)
        if self.dataset.fraction < 1:
            keep &= in_share(content_keys(documents), self.dataset.fraction, f"fraction {self.dataset.seed}")
            counts["fraction"] = int((~keep).sum())
        if self.held_out is not None:
            hits = keep & self.held_out.hits(documents)
            counts["measured"] = int(hits.sum())
            keep &= ~hits
        return (documents if keep.all() else take(documents, np.flatnonzero(keep))), bad, counts

    def keys(self, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
        """Content keys and row numbers of the documents that stay."""
        read = [self.documents(batch)[0] for batch in read_unit(unit, stamp=self.stamps[unit.uri])]
        hashes = [np.zeros(0, np.uint64), *(content_keys(documents) for documents in read)]
        numbers = [np.zeros(0, np.int64), *(documents.numbers for documents in read)]
        return np.concatenate(hashes), np.concatenate(numbers)

    def build(self, number: int, unit: Unit, batches: Iterable[RowBatch], folder: Path, key: str) -> Facts:
        """Write the unit's files into a folder; returns what its index says."""
        noted = len(self.renderer.notes)
        made = Filling(self, folder, key)
        for batch in batches:
            made.add(batch, self.duplicates.get(number))
        if len(self.renderer.notes) > noted:  # a row showed that earlier ones may be wrong: all again, the exact way
            return self.build(number, unit, read_unit(unit, stamp=self.stamps[unit.uri]), folder, key)
        return {"key": key, "unit": asdict(unit), "inputs": self.unit_inputs(number, unit), **made.close()}


def rows_to_drop(units: list[tuple[np.ndarray, np.ndarray]]) -> dict[int, np.ndarray]:
    """By unit, the rows whose document stands in an earlier row; from (content keys, row numbers) of each unit."""
    every = np.concatenate([k for k, _ in units]) if units else np.zeros(0, np.uint64)
    first = np.zeros(len(every), bool)
    first[np.unique(every, return_index=True)[1]] = True
    edges = np.cumsum([0, *(len(k) for k, _ in units)])
    return {i: numbers[~first[edges[i] : edges[i + 1]]] for i, (_, numbers) in enumerate(units)}
