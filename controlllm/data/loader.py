"""Packed rows to batches. The order is a pure function of (seed, place): resuming is a step number."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from controlllm.config import MixConfig, PackConfig
from controlllm.data.order import SIDE_BY_SIDE, DatasetOrder, Interleave, SortedOrder
from controlllm.data.shelf import PackedRow, Shelf

IGNORED = -100
EMPTY_TOKENS = 8


@dataclass(frozen=True)
class Batch:
    """Packed rows end to end, without padding; positions restart and attention ends at every document."""

    input_ids: Tensor  # (1, tokens)
    labels: Tensor  # (1, tokens), IGNORED where nothing is learned
    position_ids: Tensor  # (1, tokens)
    cu_seq_lens_q: Tensor  # (documents + 1,) int32, where documents begin and the last one ends
    token_mask: Tensor | None = None  # (1, tokens), False where the divergence counts nothing

    def arguments(self, attention: str = "packed") -> dict[str, Any]:
        """Keyword arguments of the model: tensors, and for flash attention lengths as numbers, too."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not attention.startswith("flash_attention"):
            return given
        longest = int(self.cu_seq_lens_q.diff().max())
        return given | {"cu_seq_lens_k": self.cu_seq_lens_q, "max_length_q": longest, "max_length_k": longest}

    @property
    def targets(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """That the divergence counts."""
        return self.input_ids.numel() if self.token_mask is None else int(self.token_mask.sum())


class Mix:
    """Several datasets as one endless order; nothing is kept but the place in it."""

    def __init__(self, shelves: Sequence[Shelf], config: MixConfig, pack: PackConfig):
        self.shelves = shelves
        self.orders = [_order(shelf, config, pack) for shelf in shelves]
        self.interleave = Interleave(_shares(shelves, config))

    @property
    def epoch_rows(self) -> int:
        """Packed rows of all datasets, each once."""
        return sum(len(order) for order in self.orders)

    def place(self, position: int) -> tuple[int, int, int]:
        """(dataset, unit, row) at a place of the endless order."""
        dataset, k = self.interleave.place(position) if len(self.shelves) > 1 else (0, position)
        return dataset, *self.orders[dataset].place(k)

    def row(self, position: int) -> PackedRow:
        dataset, unit, row = self.place(position)
        return self.shelves[dataset].read(unit, row)

    def step(self, step: int, *, global_batch: int, micro_batch: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """This process's micro-batches of one optimizer step; row g of the global batch goes to rank g mod world."""
        rows = [self.row(step * global_batch + g) for g in range(rank, global_batch, world)]
        return [collate(rows[i : i + micro_batch]) for i in range(0, len(rows), micro_batch)]

    def validation(self, rows: int) -> list[PackedRow]:
        """The first held-back rows, of all datasets in turn; the same however far the shards are made."""
        return list(islice(_in_turn([shelf.validation() for shelf in self.shelves]), rows))


def _order(shelf: Shelf, config: MixConfig, pack: PackConfig) -> DatasetOrder | SortedOrder:
    if config.order == "length":
        return SortedOrder([shelf.mean_lengths(unit) for unit in range(shelf.units)])
    return DatasetOrder(
        shelf.name,
        shelf.units,
        shelf.rows_of,
        seed=config.seed,
        shuffled=config.order == "shuffle",
        side_by_side=SIDE_BY_SIDE if pack.strategy == "pad" else 1,
    )


def _shares(shelves: Sequence[Shelf], config: MixConfig) -> list[float]:
    """Of the packed rows. Weights are shares of tokens; without them every row comes `epochs` times in a pass."""
    if len(shelves) == 1:
        return [1.0]
    if all(d.weight is not None for d in config.datasets):
        return [(d.weight or 0) / s.tokens_per_row() for d, s in zip(config.datasets, shelves, strict=True)]
    rows = [sum(shelf.rows_of(unit) for unit in range(shelf.units)) for shelf in shelves]
    counts = [round(n * d.epochs) or 1 for n, d in zip(rows, config.datasets, strict=True)]
    if config.temperature == 1:
        return [float(n) for n in counts]
    tokens = [n * shelf.tokens_per_row() for n, shelf in zip(counts, shelves, strict=True)]
    return [t ** (1 / config.temperature) / s.tokens_per_row() for t, s in zip(tokens, shelves, strict=True)]


def _in_turn(sequences: list[Iterator[PackedRow]]) -> Iterator[PackedRow]:
    while sequences:
        for sequence in list(sequences):
            row = next(sequence, None)
            if row is None:
                sequences.remove(sequence)
            else:
                yield row


def batches(rows: Sequence[PackedRow], *, size: int) -> Iterator[Batch]:
    """Rows in order, for validation."""
    for start in range(0, len(rows), size):
        yield collate(rows[start : start + size])


def collate(rows: Iterable[PackedRow]) -> Batch:
    """One sequence of all the rows' documents."""
    rows = list(rows)
    lengths = np.concatenate([row["lengths"] for row in rows])
    ids = np.concatenate([row["input_ids"] for row in rows]).astype(np.int64)
    edges = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.where(np.concatenate([row["target"] for row in rows]), ids, IGNORED)
    labels[edges[:-1]] = IGNORED  # a document's first token must not be predicted from the document before it
    positions = np.arange(len(ids)) - np.repeat(edges[:-1], lengths)
    ids, labels, positions = (torch.from_numpy(array)[None] for array in (ids, labels, positions))
    return Batch(ids, labels, positions, torch.from_numpy(edges.astype(np.int32)))


def empty_batch(row: PackedRow) -> Batch:
    """A few tokens of a row of which none counts: loss and gradients are exactly 0.

    For a process that has fewer micro-batches than another and must run as many passes, to stay in step under FSDP.
    """
    ids = row["input_ids"][:EMPTY_TOKENS]
    batch = collate([{"input_ids": ids, "lengths": np.array([len(ids)]), "target": np.zeros(len(ids), bool)}])
    return replace(batch, token_mask=torch.zeros_like(batch.input_ids, dtype=torch.bool))
