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
    """What the model is given. Positions restart at every document, which keeps attention inside it."""

    input_ids: Tensor  # (rows, seq)
    labels: Tensor  # (rows, seq), IGNORED where nothing is learned
    position_ids: Tensor  # (rows, seq)
    token_mask: Tensor  # (rows, seq), False on padding

    def arguments(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("input_ids", "labels", "position_ids", "token_mask")}

    @property
    def targets(self) -> int:
        """Tokens that count in the loss: a row's first token has nothing before it to be predicted from."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def tokens(self) -> int:
        return int(self.token_mask.sum())


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
    """Rows of different lengths, padded to the longest. Padding is a document of its own: positions restart there."""
    width = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), width)
    ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    positions, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        starts = np.cumsum(row["lengths"]) - row["lengths"]
        ids[i, :length] = row["input_ids"]
        labels[i, :length] = np.where(row["target"], row["input_ids"], IGNORED)
        labels[i, starts] = IGNORED  # a document's first token must not be predicted from the one before it
        positions[i, :length] = np.arange(length) - np.repeat(starts, row["lengths"])
        positions[i, length:] = np.arange(width - length)
        mask[i, :length] = True
    return Batch(*map(torch.from_numpy, (ids, labels, positions, mask)))
