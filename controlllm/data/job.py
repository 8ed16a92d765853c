"""One unit of a source to one shard: read, filter, render, tokenise, pack, write."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from controlllm.config import DatasetConfig, PackConfig
from controlllm.data.catalog import find_dataset
from controlllm.data.documents import documents as read_documents
from controlllm.data.documents import take
from controlllm.data.held_out import HeldOut
from controlllm.data.keys import content_keys, in_share, prompt_keys
from controlllm.data.manifest import read_unit, unit_hash
from controlllm.data.pack import Bins, Pieces, best_fit, best_fit_stream, cut, gather, one_each, wrap
from controlllm.data.render import Renderer
from controlllm.data.shard import Facts, ShardWriter, file_name, id_type
from controlllm.data.steps import build_steps, step_fingerprint
from controlllm.data.tighten import tighten
from controlllm.data.types import BadRow, Documents, RowBatch, Stamp, TokenBatch, Unit
from controlllm.errors import UserError
from controlllm.fingerprint import PACKAGE, content_of, source_hash

KEPT_BAD_ROWS = 1000
"""Bad rows of a unit that are told one by one; beyond it they are only counted."""
CODE = (
    *("columns", "content_use", "decontaminate", "documents", "formats", "forms", "job", "keys", "lines", "messages"),
    *("pack", "parquet", "plan", "render", "separated", "shard", "template", "tighten", "tokenize", "types", "units", "writer"),
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
        return {name: value for name, value in self.__dict__.items() if name not in ("reader", "steps", "inputs")}

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

    def build(self, number: int, unit: Unit, batches: Iterable[RowBatch], folder: Path, key: str) -> Facts:
        """Write the unit's files into a folder; returns what its index says."""
        noted = len(self.renderer.notes)
        made = _Shard(self, folder, key)
        for batch in batches:
            made.add(batch, self.duplicates.get(number))
        if len(self.renderer.notes) > noted:  # a row showed that earlier ones may be wrong: all again, the exact way
            return self.build(number, unit, read_unit(unit, stamp=self.stamps[unit.uri]), folder, key)
        return {"key": key, "unit": asdict(unit), "inputs": self.unit_inputs(number, unit), **made.close()}


class _Shard:
    """The files of one shard in the making. Rows in = rows packed + filtered + bad."""

    def __init__(self, job: Job, folder: Path, key: str):
        self.job, self.folder, self.key = job, folder, key
        self.rows = self.waiting = self.packed = 0
        self.filtered: Counter[str] = Counter()
        self.cuts: Counter[str] = Counter()
        self.bad: list[BadRow] = []
        self.bad_rows = 0
        self.lengths = np.zeros(64, np.int64)  # documents of up to 2**i tokens
        self.dtype = id_type(job.vocabulary)
        self.parts: list[tuple[TokenBatch, np.ndarray, np.ndarray]] = []
        self.writers: dict[str, ShardWriter] = {}
        self.file = ""

    def add(self, batch: RowBatch, duplicates: np.ndarray | None) -> None:
        self.rows += len(batch) + len(batch.bad)
        self.file = batch.file
        documents, bad, filtered = self.job.documents(batch)
        self._set_aside([*batch.bad, *bad])
        self.filtered += filtered
        if duplicates is not None and len(duplicates):
            new = ~np.isin(documents.numbers, duplicates)
            self.filtered["repeated"] += int((~new).sum())
            documents = take(documents, np.flatnonzero(new))
        if not len(documents):
            return
        tokens = self.job.renderer.encode(documents)
        self._set_aside(BadRow(batch.file, int(documents.numbers[i]), None, reason) for i, reason in tokens.bad)
        held_back = np.zeros(len(documents), bool)
        if fraction := self.job.pack.validation_fraction:
            held_back = in_share(prompt_keys(documents), fraction, "validation")
        tokens.ids = tokens.ids.astype(self.dtype)
        self.parts.append((tokens, documents.numbers[tokens.index], held_back[tokens.index]))
        self.waiting += len(tokens)
        if self.waiting >= 1.5 * self.job.pack.unit_rows:  # a unit is up to half as large again; a whole file may be any
            self._flush()

    def _set_aside(self, bad: Iterable[BadRow]) -> None:
        for row in bad:
            self.bad_rows += 1
            if len(self.bad) < KEPT_BAD_ROWS:
                self.bad.append(row)

    def _flush(self) -> None:
        """Pack what has been read so far."""
        if not self.waiting:
            return
        ids = np.concatenate([tokens.ids for tokens, _, _ in self.parts])
        target = np.concatenate([tokens.target for tokens, _, _ in self.parts])
        lengths = np.concatenate([np.diff(tokens.offsets) for tokens, _, _ in self.parts])
        numbers = np.concatenate([numbers for _, numbers, _ in self.parts])
        held_back = np.concatenate([held_back for _, _, held_back in self.parts])
        self.parts, self.waiting = [], 0
        starts = np.cumsum(lengths) - lengths
        self.lengths += np.bincount(np.ceil(np.log2(lengths)).astype(np.int64), minlength=64)
        for kind, chosen in (("train", ~held_back), ("validation", held_back)):
            if chosen.any():
                self._pack(kind, ids, target, starts[chosen], lengths[chosen], numbers[chosen])

    def _pack(
        self, kind: str, ids: np.ndarray, target: np.ndarray, starts: np.ndarray, lengths: np.ndarray, rows: np.ndarray
    ) -> None:
        """Documents at `starts` of the flat tokens, with the source rows they came from, into one file."""
        pieces, bins = self._pieces(lengths, rows, target, starts)
        order = bins.items
        begin, length = starts[pieces.document[order]] + pieces.start[order], pieces.length[order]
        if kind not in self.writers:
            file = self.folder / file_name(self.key, kind)
            self.writers[kind] = ShardWriter(file, vocabulary=self.job.vocabulary)
        self.writers[kind].write(
            gather(ids, begin, length),
            gather(target, begin, length),
            length,
            rows[pieces.document[order]],
            bins.offsets,
        )
        self.packed += len(np.unique(pieces.document))

    def _pieces(
        self, lengths: np.ndarray, rows: np.ndarray, target: np.ndarray, starts: np.ndarray
    ) -> tuple[Pieces, Bins]:
        pack = self.job.pack
        if pack.strategy == "wrap":
            wrapped = wrap(lengths, pack.context_length)
            self.cuts["split"] += int((np.bincount(wrapped.pieces.document) > 1).sum())
            return wrapped
        made = self._cut(lengths, rows)
        self.cuts.update(split=made.split, truncated=made.truncated, lost_tokens=made.lost_tokens)
        pieces = _with_targets(made.pieces, target, starts, lengths)
        self.filtered["overlong"] += len(lengths) - len(np.unique(pieces.document))
        if pack.strategy == "pad":
            return pieces, one_each(pieces.length)
        if pack.strategy == "best_fit_stream":
            return pieces, best_fit_stream(pieces.length, pack.context_length)
        fit = best_fit(pieces.length, pack.context_length)
        return pieces, tighten(pieces.length, fit, pack.context_length)

    def _cut(self, lengths: np.ndarray, rows: np.ndarray) -> Any:
        try:
            return cut(lengths, self.job.pack.context_length, self.job.pack.overlong)
        except UserError as error:
            row = rows[getattr(error, "document", 0)]
            raise UserError(f"{self.job.where}: {self.file}:{row}: {error}") from None

    def close(self) -> Facts:
        self._flush()
        files = {kind: writer.close() for kind, writer in self.writers.items()}
        filtered = {name: count for name, count in sorted(self.filtered.items()) if count}
        assert self.rows == self.packed + sum(filtered.values()) + self.bad_rows, "every row is somewhere"
        return {
            "rows": self.rows,
            "packed_documents": self.packed,
            "filtered": filtered,
            "bad_rows": self.bad_rows,
            "bad": [asdict(row) for row in self.bad],
            "cut": {name: count for name, count in sorted(self.cuts.items()) if count},
            "tokenizer": self.job.renderer.facts()["tokenizer"],
            "lengths": {str(1 << power): int(self.lengths[power]) for power in np.flatnonzero(self.lengths).tolist()},
            "files": files,
        }


def _with_targets(pieces: Pieces, target: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Pieces:
    """A piece of a split conversation may hold the question alone: there is nothing to learn from it."""
    some = np.ones(len(pieces), bool)
    for i in np.flatnonzero(pieces.length < lengths[pieces.document]).tolist():
        begin = starts[pieces.document[i]] + pieces.start[i]
        some[i] = target[begin : begin + pieces.length[i]].any()
    return pieces if some.all() else Pieces(pieces.document[some], pieces.start[some], pieces.length[some])


def rows_to_drop(keys: Iterator[tuple[np.ndarray, np.ndarray]]) -> dict[int, np.ndarray]:
    """By unit, the rows whose document stands in an earlier row; from (content keys, row numbers) of each unit."""
    units = list(keys)
    every = np.concatenate([k for k, _ in units]) if units else np.zeros(0, np.uint64)
    first = np.zeros(len(every), bool)
    first[np.unique(every, return_index=True)[1]] = True
    edges = np.cumsum([0, *(len(k) for k, _ in units)])
    return {i: numbers[~first[edges[i] : edges[i + 1]]] for i, (_, numbers) in enumerate(units)}
