"""A shard in the making: documents as they are read, cut to size, packed and written."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from controlllm.data.documents import take
from controlllm.data.keys import in_share, prompt_keys
from controlllm.data.pack import Bins, Pieces, best_fit, best_fit_stream, cut, gather, one_each, wrap
from controlllm.data.shard import Facts, ShardWriter, file_name, id_type
from controlllm.data.tighten import tighten
from controlllm.data.types import BadRow, RowBatch, TokenBatch
from controlllm.errors import UserError

if TYPE_CHECKING:
    from controlllm.data.job import Job

KEPT_BAD_ROWS = 1000
"""Bad rows of a unit that are told one by one; beyond it they are only counted."""


class Filling:
    """The files of one shard in the making. Rows in = rows packed + filtered + bad."""

    def __init__(self, job: "Job", folder: Path, key: str):
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
        if self.waiting >= 1.5 * self.job.pack.unit_rows:  # more than a unit has: a file read whole
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
            "bad": [asdict(row) for row in sorted(self.bad, key=lambda row: row.row)],
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
