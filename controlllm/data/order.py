"""The order of packed rows: a pure function of (seed, epoch, units), the same for any number of processes.

One dataset is shown unit by unit in blocks: the rows of a block are shuffled together, the first blocks are single
units, so that training starts when the first unit is there. Several datasets are laid into each other by their shares.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

BLOCK_UNITS = 16
"""Units whose rows are shuffled together, once the first few are through."""
SIDE_BY_SIDE = 64
"""Rows of similar length that stay together with strategy pad."""
WINDOW = 4096


class DatasetOrder:
    """Where the k-th packed row of a dataset's endless order lies.

    `rows_of(unit)` gives the number of a unit's packed rows and may wait until it is made.
    """

    def __init__(
        self,
        name: str,
        units: int,
        rows_of: Callable[[int], int],
        *,
        seed: int,
        shuffled: bool = True,
        side_by_side: int = 1,
    ):
        self.name, self.units, self.rows_of = name, units, rows_of
        self.seed, self.shuffled, self.side_by_side = seed, shuffled, side_by_side
        self._total = 0  # rows of an epoch, once the end of the first is reached
        # Of the epoch that was asked for last: its blocks, where each ends, and the places of the last block.
        self._epoch = -1
        self._blocks: list[list[int]] = []
        self._ends: list[int] = []
        self._block: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return sum(self.rows_of(unit) for unit in range(self.units))

    def place(self, k: int) -> tuple[int, int]:
        """(unit, row in it) of the k-th row; k counts on through all epochs."""
        number = None if self._total else self._block_of(0, k)
        if number is None:
            self._total = self._total or len(self)
            epoch, k = divmod(k, self._total)
            number = self._block_of(epoch, k)
        assert number is not None, "k lies within the epoch"
        begin = self._ends[number - 1] if number else 0
        unit, row = self._rows(number)[k - begin]
        return int(unit), int(row)

    def blocks(self, epoch: int) -> list[list[int]]:
        """Units in the order of an epoch, in blocks that are shuffled within."""
        order = np.arange(self.units)
        lead = min(4, self.units) if epoch == 0 else 0  # made first, so shown first
        if self.shuffled:
            order[lead:] = self._random(epoch, "units").permutation(order[lead:])
        sizes = [1] * lead
        while sum(sizes) < self.units:
            sizes.append(min(BLOCK_UNITS, 2 * sizes[-1] if sizes else BLOCK_UNITS))
        edges = np.cumsum([0, *sizes])
        return [order[a:b].tolist() for a, b in pairwise(edges)]

    def unit_order(self) -> list[int]:
        """In which the units are needed."""
        return [unit for block in self.blocks(0) for unit in block]

    def _block_of(self, epoch: int, k: int) -> int | None:
        """The block of an epoch that holds its k-th row, waiting for no more units than that takes."""
        if epoch != self._epoch:
            self._epoch, self._blocks, self._ends, self._block = epoch, self.blocks(epoch), [], None
        ends = self._ends
        while not ends or ends[-1] <= k:
            if len(ends) == len(self._blocks):
                if not ends or not ends[-1]:
                    raise ValueError(f"{self.name}: has no packed row")
                return None
            ends.append((ends[-1] if ends else 0) + sum(self.rows_of(unit) for unit in self._blocks[len(ends)]))
        return bisect_right(ends, k)

    def _rows(self, block: int) -> np.ndarray:
        """(rows, 2): unit and row of each place in a block."""
        if self._block is None or self._block[0] != block:
            units = self._blocks[block]
            counts = [self.rows_of(unit) for unit in units]
            rows = np.stack([np.repeat(units, counts), np.concatenate([np.arange(n) for n in counts])], axis=1)
            if self.shuffled:
                rows = rows[self._shuffle(len(rows), self._random(self._epoch, f"block {block}"))]
            self._block = (block, rows)
        return self._block[1]

    def _shuffle(self, count: int, random: np.random.Generator) -> np.ndarray:
        if self.side_by_side == 1:
            return random.permutation(count)
        groups = -(-count // self.side_by_side)
        moved = random.permutation(groups)[:, None] * self.side_by_side + np.arange(self.side_by_side)
        return moved.ravel()[moved.ravel() < count]

    def _random(self, epoch: int, purpose: str) -> np.random.Generator:
        words = [self.seed, epoch, *self.name.encode(), *purpose.encode()]
        return np.random.Generator(np.random.PCG64(words))


class SortedOrder:
    """All rows of a dataset by a key, the same in every epoch: a curriculum."""

    def __init__(self, keys: Sequence[np.ndarray]):
        units = np.repeat(np.arange(len(keys)), [len(k) for k in keys])
        rows = np.concatenate([np.arange(len(k)) for k in keys])
        by_key = np.argsort(np.concatenate(keys), kind="stable")
        self.rows = np.stack([units, rows], axis=1)[by_key]

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, k: int) -> tuple[int, int]:
        unit, row = self.rows[k % len(self.rows)]
        return int(unit), int(row)


class Interleave:
    """Which dataset is next: the k-th row of a dataset with share s is due at (k + 1/2) / s, the earliest comes first.

    Any prefix of the order holds each dataset's share of it within one row per dataset.
    """

    def __init__(self, shares: Sequence[float]):
        self.shares = np.asarray(shares, float) / sum(shares)
        self._window: tuple[int, np.ndarray] | None = None

    def place(self, position: int) -> tuple[int, int]:
        """(dataset, k): the k-th row of that dataset."""
        number, index = divmod(position, WINDOW)
        if self._window is None or self._window[0] != number:
            self._window = (number, self._places(number * WINDOW))
        dataset, k = self._window[1][index]
        return int(dataset), int(k)

    def _places(self, start: int) -> np.ndarray:
        """(WINDOW, 2) from a position on, without walking there."""
        margin = len(self.shares) + 1
        first = np.maximum(np.ceil(self.shares * (start - margin) - 0.5), 0).astype(np.int64)
        last = np.ceil(self.shares * (start + WINDOW + margin) + 0.5).astype(np.int64)
        dataset = np.repeat(np.arange(len(self.shares)), last - first)
        k = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        order = np.lexsort((dataset, (k + 0.5) / self.shares[dataset]))
        skipped = start - int(first.sum())
        return np.stack([dataset, k], axis=1)[order][skipped : skipped + WINDOW]
