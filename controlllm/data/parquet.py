"""Row groups of Parquet files: where they lie, their rows, their bytes."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from controlllm.data.location import is_remote, local_path, open_file, shown
from controlllm.data.remote import fetched
from controlllm.data.seekable import Seekable
from controlllm.data.types import Unit
from controlllm.errors import UserError

HASH_BYTES = 1 << 22
# A damaged footer can hold names that are not UTF-8 and sizes beyond any memory.
_DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError, OverflowError)


@lru_cache(64)
def footer(uri: str, version: str) -> pq.FileMetaData:
    """A file's footer; `version` of its stamp makes a changed file another one."""
    with open_file(uri) as file:
        try:
            return pq.read_metadata(file)
        except (*_DAMAGE, EOFError) as error:
            raise UserError(f"{shown(uri)}: damaged Parquet file: {_line(error)}") from None


def span(metadata: pq.FileMetaData, group: int) -> tuple[int, int]:
    """The bytes [start, end) of a row group's columns."""
    row_group = metadata.row_group(group)
    starts, ends = [], []
    for index in range(row_group.num_columns):
        column = row_group.column(index)
        first = column.data_page_offset
        if column.has_dictionary_page and column.dictionary_page_offset:
            first = min(first, column.dictionary_page_offset)
        starts.append(first)
        ends.append(first + column.total_compressed_size)
    return min(starts), max(ends)


def first_number(metadata: pq.FileMetaData, unit: Unit) -> int:
    """Number in the file of a unit's first row, from 1 on."""
    assert unit.row_group is not None
    return 1 + unit.offset + sum(metadata.row_group(group).num_rows for group in range(unit.row_group))


def read_groups(
    unit: Unit, rows: int, *, version: str, columns: Sequence[str] | None, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """`rows` rows from the unit's offset on, in batches; columns that the file does not have are left out."""
    assert unit.row_group is not None
    metadata = footer(unit.uri, version)
    groups = list(range(unit.row_group, unit.row_group + unit.row_groups))
    skip, left = unit.offset, rows
    try:
        file = pq.ParquetFile(_source(unit, version), metadata=metadata, page_checksum_verification=True)
        wanted = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_rows, row_groups=groups, columns=wanted, use_threads=False):
            piece = batch.slice(skip, left)
            skip = max(skip - batch.num_rows, 0)
            if piece.num_rows:
                left -= piece.num_rows
                yield piece
            if not left:
                return
    except _DAMAGE as error:
        where = f"{shown(unit.uri)}: damaged Parquet file: row group {groups[0]}"
        raise UserError(f"{where}, after {rows - left} rows: {_line(error)}") from None
    raise UserError(f"{shown(unit.uri)}: damaged Parquet file: row group {groups[0]} has {left} rows less than it says")


def groups_hash(unit: Unit, version: str) -> str:
    """Hash of the schema and of the bytes of a unit's row groups."""
    assert unit.row_group is not None
    digest = xxhash.xxh3_128(_schema(unit.uri, version))
    for group in range(unit.row_group, unit.row_group + unit.row_groups):
        digest.update(_group_hash(unit.uri, version, group))
    return digest.hexdigest()


@lru_cache(64)
def _schema(uri: str, version: str) -> bytes:
    schema = footer(uri, version).schema.to_arrow_schema().remove_metadata()
    return schema.serialize().to_pybytes()


@lru_cache(256)
def _group_hash(uri: str, version: str, group: int) -> bytes:
    start, end = span(footer(uri, version), group)
    if is_remote(uri):
        return xxhash.xxh3_128_digest(fetched(uri, version, start, end))
    return hash_range(uri, start, end)


def hash_range(uri: str, start: int, end: int) -> bytes:
    """xxh3-128 of bytes [start, end) of a file; a file that ends before is a UserError."""
    digest = xxhash.xxh3_128()
    with open_file(uri) as file:
        file.seek(start)
        while start < end:
            block = file.read(min(HASH_BYTES, end - start))
            if not block:
                raise UserError(f"{shown(uri)}: ends at byte {start}, expected {end}: it was changed or cut off")
            digest.update(block)
            start += len(block)
    return digest.digest()


def _source(unit: Unit, version: str) -> Any:
    path = local_path(unit.uri)
    if path is not None:
        return pa.OSFile(str(path))
    return pa.PythonFile(_Stretch(fetched(unit.uri, version, unit.start, unit.end), unit.start), "r")


class _Stretch(Seekable):
    """A file of which only one stretch is here, and nothing else is read."""

    def __init__(self, content: bytes, start: int):
        super().__init__(start + len(content))
        self._content, self._start = memoryview(content), start

    def read(self, size: int = -1) -> memoryview:  # type: ignore[override] - bytes to pyarrow, without a copy
        first = self._at - self._start
        assert first >= 0, "only the row groups of the unit are read"
        piece = self._content[first:] if size < 0 else self._content[first : first + size]
        self._at += len(piece)
        return piece


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
