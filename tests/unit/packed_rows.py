"""Packed rows in memory, where a test needs no files."""

import numpy as np

from controlllm.config import DatasetConfig, MixConfig, PackConfig
from controlllm.data.loader import Mix


class Rows:
    """A shelf of one unit."""

    units = 1

    def __init__(self, rows, name="a"):
        self.rows, self.name = [{"rows": np.array([n])} | row for n, row in enumerate(rows, start=1)], name

    def facts(self, unit):
        return {"unit": {"uri": f"{self.name}.jsonl", "start": 0, "format": "jsonl"}}

    def rows_of(self, unit, kind="train"):
        return len(self.rows)

    def read(self, unit, row, kind="train"):
        return self.rows[row]

    def tokens_per_row(self):
        return sum(len(row["input_ids"]) for row in self.rows) / len(self.rows)

    def validation(self):
        return iter(())


def mix_of(*shelves, datasets=None, **changes):
    datasets = datasets or [DatasetConfig(name=shelf.name) for shelf in shelves]
    return Mix(list(shelves), MixConfig(datasets=datasets, **changes), PackConfig())
