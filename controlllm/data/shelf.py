"""The shards of a dataset as a sequence of packed rows, memory-mapped, each batch checked against its hash once."""

import json
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from controlllm.data.shard import BATCH_ROWS, Facts, batch_hash, file_name
from controlllm.data.shard_store import ShardStore
from controlllm.errors import UserError
from controlllm.progress import console

OPEN_FILES = 64
OPEN_BATCHES = 256
PackedRow = dict[str, np.ndarray]
"""input_ids, target: (tokens,) · lengths, rows: (documents,)"""


class _Batch(NamedTuple):
    """Views of one record batch."""

    tokens: np.ndarray  # (rows + 1,) where each row's tokens begin
    input_ids: np.ndarray
    target: np.ndarray  # uint8, a bit per token
    documents: np.ndarray  # (rows + 1,) where each row's documents begin
    lengths: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "_Batch":
        """Of the buffers themselves: `to_numpy` would import pandas for it."""
        tokens, ids = _list(batch.column("input_ids"))
        _, target = _list(batch.column("target"))
        documents, lengths = _list(batch.column("lengths"))
        return cls(tokens, ids, target, documents, lengths, _list(batch.column("rows"))[1])


def _list(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a column of lists; bits as bytes."""
    kind = column.type.value_type
    values = np.uint8 if pa.types.is_boolean(kind) else kind.to_pandas_dtype()
    _, offsets, _, data = column.buffers()
    return np.frombuffer(offsets, np.int32)[: len(column) + 1], np.frombuffer(data, values)


class Shelf:
    """The folder of one prepared dataset: `index.json` and its shards."""

    def __init__(self, folder: Path, name: str, units: Sequence[Facts]):
        self.folder, self.name, self.units = folder, name, len(units)
        self._facts = units
        self._files: OrderedDict[tuple[int, str], Any] = OrderedDict()
        self._batches: OrderedDict[tuple[int, str, int], _Batch] = OrderedDict()
        self._checked: set[tuple[int, str, int]] = set()

    @classmethod
    def open(cls, folder: Path) -> "Shelf":
        """What prepare wrote. Raises UserError when the folder holds no prepared dataset."""
        index = _read(folder / "index.json")
        return cls(folder, index["name"], index["units"])

    def facts(self, unit: int) -> Facts:
        return self._facts[unit]

    def rows_of(self, unit: int, kind: str = "train") -> int:
        """Packed rows of a unit."""
        return self.facts(unit)["files"].get(kind, {}).get("bins", 0)

    def path(self, unit: int, kind: str) -> Path:
        return self.folder / file_name(self.facts(unit)["key"], kind)

    def read(self, unit: int, row: int, kind: str = "train") -> PackedRow:
        """One packed row, as views of the mapped file."""
        number, place = divmod(row, BATCH_ROWS)
        batch = self._batch(unit, kind, number)
        begin, end = batch.tokens[place : place + 2].tolist()
        first, last = batch.documents[place : place + 2].tolist()
        bits = np.unpackbits(batch.target[begin // 8 : -(-end // 8)], bitorder="little")
        return {
            "input_ids": batch.input_ids[begin:end],
            "target": bits[begin % 8 : begin % 8 + end - begin].view(np.bool_),
            "lengths": batch.lengths[first:last],
            "rows": batch.rows[first:last],
        }

    def tokens_per_row(self) -> float:
        """Mean over the first unit that has rows: known as soon as it is."""
        for unit in range(self.units):
            if rows := self.rows_of(unit):
                return self.facts(unit)["files"]["train"]["tokens"] / rows
        return 1.0

    def mean_lengths(self, unit: int) -> np.ndarray:
        """(rows,) mean tokens of a packed row's documents."""
        batches = [self._batch(unit, "train", number) for number in range(-(-self.rows_of(unit) // BATCH_ROWS))]
        means = [np.diff(batch.tokens) / np.diff(batch.documents) for batch in batches]
        return np.concatenate([np.zeros(0), *means])

    def validation(self) -> Iterator[PackedRow]:
        """Held-back rows, unit by unit."""
        for unit in range(self.units):
            for row in range(self.rows_of(unit, "validation")):
                yield self.read(unit, row, "validation")

    def _batch(self, unit: int, kind: str, number: int) -> "_Batch":
        key = (unit, kind, number)
        if key not in self._batches:
            batch = self._file(unit, kind).get_batch(number)
            if key not in self._checked:
                self._check(unit, kind, number, batch)
            self._batches[key] = _Batch.of(batch)
            if len(self._batches) > OPEN_BATCHES:
                self._batches.popitem(last=False)
        self._batches.move_to_end(key)
        return self._batches[key]

    def _check(self, unit: int, kind: str, number: int, batch: pa.RecordBatch) -> None:
        if batch_hash(batch) != self.facts(unit)["files"][kind]["batches"][number]:
            raise UserError(
                f"{self.path(unit, kind)}: packed rows {number * BATCH_ROWS} and after are not what was written; "
                "remove the file and run again"
            )
        self._checked.add((unit, kind, number))

    def _file(self, unit: int, kind: str) -> Any:
        if (unit, kind) not in self._files:
            file = self.path(unit, kind)
            try:
                self._files[unit, kind] = pa.ipc.open_file(pa.memory_map(str(file)))
            except (OSError, pa.ArrowInvalid) as error:
                raise UserError(f"{file}: cannot be read ({error}); remove it and run again") from None
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end((unit, kind))
        return self._files[unit, kind]


class StoredShelf(Shelf):
    """Shards as they lie in the store."""

    def __init__(self, name: str, units: Sequence[Facts], shards: str):
        super().__init__(Path(shards), name, units)
        self.store = ShardStore(shards)

    def path(self, unit: int, kind: str) -> Path:
        return self.store.path(self.facts(unit)["key"], kind)


class GrowingShelf(StoredShelf):
    """Shards that are being made: `units/<number>.json` appears for each, `failed.json` when it goes wrong."""

    def __init__(self, folder: Path, *, name: str, units: int, shards: str):
        super().__init__(name, [], shards)
        self.folder, self.units = folder, units
        self._known: dict[int, Facts] = {}

    def facts(self, unit: int) -> Facts:
        """Waits until the unit is there. Raises UserError when it never will be."""
        if unit not in self._known:
            self._known[unit] = self._wait(self.folder / "units" / f"{unit}.json")
        return self._known[unit]

    def _wait(self, file: Path) -> Facts:
        told = time.monotonic()
        while not file.exists():
            if (failed := self.folder / "failed.json").exists():
                raise UserError(_read(failed)["error"])
            if time.monotonic() - told > 10:
                console.print(
                    f"  waiting for {self.name}: shard {file.stem} of {self.units} is being made", markup=False
                )
                told = time.monotonic()
            time.sleep(0.01)
        return _read(file)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: not found; give a folder that controlllm prepare made") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: damaged ({error.msg}); remove {file.parent} and run again") from None
