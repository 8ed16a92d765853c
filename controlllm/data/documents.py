"""From rows to documents: reads a batch, runs the steps, and accounts for every row."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from controlllm.data.columns import read_columns
from controlllm.data.dataset import Dataset
from controlllm.data.forms import form_names
from controlllm.data.messages import RowError, checked, kind, missing
from controlllm.data.steps import Step
from controlllm.data.types import BadRow, Document, Documents, Row, RowBatch
from controlllm.errors import UserError

# What a function of the user's may raise whatever the row is; anything else is taken as said of the row.
NOT_OF_A_ROW = (OSError, MemoryError, ImportError)


class Read(NamedTuple):
    """The documents of a batch, the rows that cannot be used, and how many rows each filter left out, by its name.

    len(batch) == len(documents) + len(bad) + sum(filtered.values()).
    """

    documents: Documents
    bad: list[BadRow]
    filtered: dict[str, int]


def documents(dataset: Dataset, batch: RowBatch, steps: Sequence[Step] = ()) -> Read:
    """Reads a batch and runs the steps over its documents, in order. `batch.bad` is the caller's to count."""
    read = _from_table(dataset, batch) if batch.table is not None else _from_rows(dataset, batch.rows(), batch)
    return _run(steps, read, batch) if steps else read


def take(documents: Documents, index: np.ndarray) -> Documents:
    """Some of the documents, by their index, in that order."""
    index = np.asarray(index, np.int64)
    counts = np.diff(documents.offsets)[index]
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
    first = np.repeat(documents.offsets[index] - offsets[:-1], counts)
    contents = np.empty(len(documents.contents), object)
    contents[:] = documents.contents
    whole = {}
    if documents.whole:
        whole = {new: documents.whole[old] for new, old in enumerate(index.tolist()) if old in documents.whole}
    chosen = contents[first + np.arange(offsets[-1])].tolist()
    return Documents(chosen, offsets, documents.shape[index], documents.shapes, documents.numbers[index], whole)


def concat(parts: Sequence[Documents]) -> Documents:
    """Documents one after another."""
    shapes: dict[tuple[str, ...], int] = {}
    shape = [np.zeros(0, np.int32)]
    offsets, contents, whole, before = [np.zeros(1, np.int64)], [], {}, 0
    for part in parts:
        renamed = [shapes.setdefault(roles, len(shapes)) for roles in part.shapes]
        shape.append(np.asarray(renamed, np.int32)[part.shape])
        offsets.append(part.offsets[1:] + len(contents))
        contents += part.contents
        whole |= {before + index: document for index, document in part.whole.items()}
        before += len(part)
    numbers = np.concatenate([np.zeros(0, np.int64), *(part.numbers for part in parts)])
    return Documents(contents, np.concatenate(offsets), np.concatenate(shape), list(shapes), numbers, whole)


def _from_table(dataset: Dataset, batch: RowBatch) -> Read:
    table = batch.table
    assert table is not None, "the caller looked"
    if dataset.form is None:
        return _from_rows(dataset, _table_rows(batch, np.arange(len(batch))), batch)
    names = form_names(dataset.form, dataset.fields, where=f"dataset '{dataset.name}': fields")
    try:
        plain = read_columns(dataset.form, table, names, frozenset(dataset.fields), batch.numbers)
    except UnicodeDecodeError:
        plain = None
    if plain is None:
        return _from_rows(dataset, _table_rows(batch, np.arange(len(batch))), batch)
    if len(plain.rows) == len(batch):
        return Read(plain.documents, [], {})
    left = np.setdiff1d(np.arange(len(batch)), plain.rows)
    part = RowBatch(batch.file, batch.numbers[left], dicts=[])
    slow = _from_rows(dataset, _table_rows(batch, left), part)
    both = concat([plain.documents, slow.documents])
    return Read(take(both, np.argsort(both.numbers, kind="stable")), slow.bad, slow.filtered)


def _table_rows(batch: RowBatch, index: np.ndarray) -> Iterable[Row | RowError]:
    """Rows of the table as dictionaries; an error instead of a row that is not UTF-8."""
    assert batch.table is not None, "the caller looked"
    part = batch.table if len(index) == len(batch) else batch.table.take(index)
    try:
        return part.to_pylist()
    except UnicodeDecodeError:
        return [_one_row(part.slice(row, 1)) for row in range(len(part))]


def _one_row(table: Any) -> Row | RowError:
    for name in table.column_names:
        try:
            table.column(name).to_pylist()
        except UnicodeDecodeError as error:
            return RowError(name, f"not UTF-8 text at byte {error.start}")
    return table.to_pylist()[0]


def _from_rows(dataset: Dataset, rows: Iterable[Row | RowError], batch: RowBatch) -> Read:
    convert = dataset.convert
    made: list[Document] = []
    numbers: list[int] = []
    bad: list[BadRow] = []
    dropped = 0
    for number, row in zip(batch.numbers.tolist(), rows, strict=True):
        try:
            document = _converted(convert, row) if dataset.form is None else convert(_whole_row(row))
        except RowError as error:
            bad.append(BadRow(batch.file, number, error.field, error.reason))
            continue
        except NOT_OF_A_ROW as error:
            raise UserError(f"dataset '{dataset.name}': {batch.file}:{number}: {_said(error)}") from error
        if document is None:
            dropped += 1
        else:
            made.append(document)
            numbers.append(number)
    kept = Documents.of(made, np.asarray(numbers, np.int64))
    return Read(kept, bad, {"dataset": dropped} if dropped else {})


def _whole_row(row: Row | RowError) -> Row:
    if isinstance(row, RowError):
        raise row
    return row


def _converted(convert: Callable[[Row], Any], row: Row | RowError) -> Document | None:
    """What the dataset's function makes of a row, or a RowError."""
    row = _whole_row(row)
    try:
        value = convert(row)
    except (RowError, *NOT_OF_A_ROW):
        raise
    except Exception as error:  # functions of other people raise anything over a row
        raise _why(convert, row, error) from error
    return None if value is None else checked(value)


def _why(convert: Callable[[Row], Any], row: Row, error: Exception) -> RowError:
    """The field that a function tripped over: the last one that it read."""
    if isinstance(error, KeyError) and error.args and error.args[0] not in row:
        return missing(row, str(error.args[0]))
    watched = _Watched(row)
    with suppress(Exception):  # the same error again; what counts is what was read before it
        convert(watched)
    reason = str(error) if isinstance(error, ValueError) else _said(error)
    if watched.last is None:
        return RowError(None, reason)
    value = row.get(watched.last)
    return RowError(watched.last, "null" if value is None else f"{reason} (found {kind(value)})")


class _Watched(dict[str, Any]):
    """A row that remembers the field that was read last."""

    last: str | None = None

    def __getitem__(self, key: str) -> Any:
        self.last = key
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.last = key
        return super().get(key, default)


def _run(steps: Sequence[Step], read: Read, batch: RowBatch) -> Read:
    """Every document through every step; what comes out is checked like a row."""
    made: list[Document] = []
    numbers: list[int] = []
    bad, filtered = list(read.bad), Counter(read.filtered)
    for index, number in enumerate(read.documents.numbers.tolist()):
        document: Document | None = read.documents[index]
        at = ""
        try:
            for step in steps:
                at = step.name
                document = _stepped(step, document)
                if document is None:
                    filtered[step.name] += 1
                    break
            else:
                made.append(_left(steps, document))
                numbers.append(number)
        except RowError as error:
            bad.append(BadRow(batch.file, number, error.field, error.reason))
        except NOT_OF_A_ROW as error:
            raise UserError(f"{batch.file}:{number}: step {at}: {_said(error)}") from error
    bad.sort(key=lambda row: row.row)
    return Read(Documents.of(made, np.asarray(numbers, np.int64)), bad, dict(filtered))


def _stepped(step: Step, document: Document) -> Document | None:
    try:
        return step.apply(document)
    except NOT_OF_A_ROW:
        raise
    except Exception as error:  # functions of other people raise anything over a row
        raise RowError(None, f"step {step.name}: {_said(error)}") from error


def _left(steps: Sequence[Step], document: Any) -> Document:
    """What is left after the steps, checked like a row."""
    try:
        return checked(document)
    except RowError as error:
        raise RowError(error.field, f"{error.reason} (after {', '.join(step.name for step in steps)})") from None


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
