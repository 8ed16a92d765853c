"""Packed rows to batches. The order is a pure function of (seed, epoch): resuming is a step number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from controlllm.errors import UserError

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Packed rows end to end, without padding; positions restart and attention ends at every document."""

    input_ids: Tensor  # (1, tokens)
    labels: Tensor  # (1, tokens), IGNORED where nothing is learned
    position_ids: Tensor  # (1, tokens)
    cu_seq_lens_q: Tensor  # (documents + 1,) int32, where documents begin and the last one ends

    def arguments(self) -> dict[str, Tensor]:
        """Keyword arguments of the model."""
        return {name: getattr(self, name) for name in ("input_ids", "labels", "position_ids", "cu_seq_lens_q")}

    @property
    def targets(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()


class PackedRows:
    """The rows of one Arrow file, memory-mapped."""

    def __init__(self, file: Path):
        if not file.exists():
            raise UserError(f"{file}: no such packed file")
        self.table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self.table.slice(index, 1)
        return {
            name: row[name].chunk(0).values.slice(*_range(row[name].chunk(0))).to_numpy(zero_copy_only=False)
            for name in row.column_names
        }


def _range(column: pa.ListArray) -> tuple[int, int]:
    begin, end = column.offsets[0].as_py(), column.offsets[1].as_py()
    return begin, end - begin


class Mix:
    """Several datasets as one endless, seeded order; a weight of 2 shows a dataset's rows twice per epoch."""

    def __init__(self, datasets: Sequence[tuple[PackedRows, float]], *, seed: int):
        self.datasets, self.seed = datasets, seed
        self.counts = [max(1, round(weight * len(rows))) for rows, weight in datasets]
        self._epochs: dict[int, list[tuple[int, int]]] = {}

    @property
    def epoch_rows(self) -> int:
        return sum(self.counts)

    def row(self, position: int) -> dict[str, np.ndarray]:
        """The row at a place of the endless order."""
        epoch, place = divmod(position, self.epoch_rows)
        dataset, index = self._order(epoch)[place]
        return self.datasets[dataset][0][index]

    def _order(self, epoch: int) -> list[tuple[int, int]]:
        if epoch not in self._epochs:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            places: list[tuple[int, int]] = []
            for dataset, ((rows, _), count) in enumerate(zip(self.datasets, self.counts, strict=True)):
                repeats = -(-count // len(rows))
                chosen = np.concatenate([generator.permutation(len(rows)) for _ in range(repeats)])[:count]
                places += [(dataset, int(index)) for index in chosen]
            self._epochs = {epoch: [places[i] for i in generator.permutation(len(places))]}
        return self._epochs[epoch]

    def step(self, step: int, *, global_batch: int, micro_batch: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """This process's micro-batches of one optimizer step; row g of the global batch goes to rank g mod world."""
        rows = [self.row(step * global_batch + g) for g in range(rank, global_batch, world)]
        return [collate(rows[i : i + micro_batch]) for i in range(0, len(rows), micro_batch)]


def batches(rows: PackedRows, *, size: int, limit: int) -> Iterator[Batch]:
    """The first `limit` rows in order, for validation."""
    count = min(len(rows), limit)
    for start in range(0, count, size):
        yield collate([rows[i] for i in range(start, min(start + size, count))])


def collate(rows: Sequence[dict[str, Any]]) -> Batch:
    """One sequence of all the rows' documents."""
    lengths = np.concatenate([row["lengths"] for row in rows])
    ids = np.concatenate([row["input_ids"] for row in rows]).astype(np.int64)
    edges = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.where(np.concatenate([row["target"] for row in rows]), ids, IGNORED)
    labels[edges[:-1]] = IGNORED  # a document's first token must not be predicted from the document before it
    positions = np.arange(len(ids)) - np.repeat(edges[:-1], lengths)
    ids, labels, positions = (torch.from_numpy(array)[None] for array in (ids, labels, positions))
    return Batch(ids, labels, positions, torch.from_numpy(edges.astype(np.int32)))
