"""The same items of a task, measured on several models, side by side."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlllm.errors import UserError

Json = dict[str, Any]
COLUMNS = ("id", "subtask", "prompt", "target", "correct", "score", "loss", "tokens")
VALUE = {"accuracy": "correct", "exact_match": "correct", "pass": "correct", "score": "score", "loss": "loss"}
"""The column that a metric is the mean of."""
TOLD = {"title", "suite", "kind", "role", "metrics"}
"""What scores.json says of every task."""


class NotComparableError(ValueError):
    """Why a task, or one of its metrics, cannot be compared; of one task, the others can be."""


@dataclass(frozen=True)
class Pairs:
    """The items of one task in the order of (subtask, id)."""

    tables: list[dict[str, list[Any]]]
    """For each model the columns, of equal items."""

    def values(self, metric: str) -> list[NDArray]:
        """What `metric` is the mean of, (items,), for each model. Raises NotComparableError."""
        columns = [table[VALUE[metric]] for table in self.tables]
        if metric == "score":  # a model with no answer between right and wrong has these
            rights = [table["correct"] for table in self.tables]
            columns = [right if None in score else score for score, right in zip(columns, rights, strict=True)]
        if missing := sum(value is None for column in columns for value in column):
            raise NotComparableError(f"{missing} of its items have no {VALUE[metric]}")
        if metric == "loss" and any(table["tokens"] != self.tables[0]["tokens"] for table in self.tables):
            raise NotComparableError("the models cut its texts into other tokens, so their losses do not compare")
        found = [np.array(column, dtype=np.float64) for column in columns]
        for number, column in enumerate(found):
            if bad := np.flatnonzero(~np.isfinite(column)).tolist():
                where = "before" if number == 0 else "after"
                said = f"item {self.tables[0]['id'][bad[0]]} has a {metric} of {column[bad[0]]} {where}"
                raise NotComparableError(f"{said}: a model that diverged cannot be compared, try a lower train.lr")
        return found

    @property
    def tokens(self) -> NDArray:
        return np.array(self.tables[0]["tokens"], dtype=np.float64)

    def clusters(self) -> NDArray | None:
        """A number for each question, (items,); None where every question stands there once.

        Subtasks are no clusters: they are what the task is made of, not drawn from more of their kind.
        """
        table, numbers = self.tables[0], {}
        keys = [
            (subtask, prompt, target) if prompt or target else (index,)
            for index, (subtask, prompt, target) in enumerate(
                zip(table["subtask"], table["prompt"], table["target"], strict=True)
            )
        ]
        found = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        return None if len(numbers) == len(keys) else found


def read_scores(folder: Path) -> Json:
    """scores.json of a benchmark. UserError where there is none that can be read."""
    file = folder / "scores.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; measure the model first (controlllm benchmark)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); measure the model again (controlllm benchmark)") from None
    tasks = found.get("tasks") if isinstance(found, dict) else None
    if not isinstance(tasks, dict) or not all(isinstance(task, dict) and set(task) >= TOLD for task in tasks.values()):
        raise UserError(f"{file}: is of an older version; measure the model again (controlllm benchmark)")
    return found


def read_pairs(folders: Sequence[Path], task: str) -> Pairs:
    """Raises NotComparableError where the models were asked different things."""
    tables = [_read(folder / "items" / f"{task}.parquet") for folder in folders]
    for folder, table in zip(folders, tables, strict=True):
        if not table["id"]:
            raise NotComparableError(f"{folder} has no items of it")
        if any(table[name] != tables[0][name] for name in ("id", "subtask", "prompt", "target")):
            raise NotComparableError(f"{_differing(tables[0], table)}: measure both alike")
    return Pairs(tables)


def _read(file: Path) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file).read(columns=list(COLUMNS))
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; measure the model again (controlllm benchmark)") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: is no Parquet file that can be read ({error}); measure the model again") from None
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise UserError(f"{file}: has no column '{missing[0]}'; measure the model again (controlllm benchmark)")
    return table.sort_by([("subtask", "ascending"), ("id", "ascending")]).to_pydict()


def _differing(one: dict[str, list[Any]], other: dict[str, list[Any]]) -> str:
    if len(one["id"]) != len(other["id"]):
        return f"{len(one['id'])} items before and {len(other['id'])} after"
    rows = [
        list(zip(*(table[n] for n in ("subtask", "id", "prompt", "target")), strict=True)) for table in (one, other)
    ]
    differ = [index for index, (a, b) in enumerate(zip(*rows, strict=True)) if a != b]
    return f"{len(differ)} of {len(rows[0])} items ask or want something else after (item {one['id'][differ[0]]})"
