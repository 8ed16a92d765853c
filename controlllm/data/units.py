"""Reading units: their rows in batches, and a hash of the bytes they are read from."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import xxhash

from controlllm.data.formats import read_file, table_batches
from controlllm.data.generated import puzzle_version, read_puzzles
from controlllm.data.lines import BLOCK_BYTES, parse_lines, split_lines
from controlllm.data.location import is_remote, local_path, open_file, shown, stamp
from controlllm.data.parquet import first_number, footer, groups_hash, hash_range, read_groups
from controlllm.data.remote import fetched
from controlllm.data.types import RowBatch, Stamp, Unit
from controlllm.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 4096


def read_unit(
    unit: Unit, *, stamp: Stamp | None = None, columns: Sequence[str] | None = None, batch_rows: int = BATCH_ROWS
) -> Iterator[RowBatch]:
    """The unit's rows in order; with a stamp, a file that changed since is a UserError.

    Bad rows stand in the batches; damage that makes the rest unreadable is a UserError.
    """
    version = _version(unit, stamp)
    if unit.row_group is not None:
        return _parquet(unit, unit.rows or 0, version, columns, batch_rows)
    if unit.format == "reasoning-gym":
        return read_puzzles(unit, batch_rows)
    if unit.format == "arrow" and not is_remote(unit.uri):
        return _arrow(unit, version, columns, batch_rows)
    if unit.format == "jsonl":
        return _lines(unit, version, batch_rows)
    return _whole(unit, batch_rows)


def read_units(
    units: Sequence[Unit],
    *,
    stamps: Mapping[str, Stamp] | None = None,
    columns: Sequence[str] | None = None,
    batch_rows: int = BATCH_ROWS,
) -> Iterator[tuple[Unit, Iterator[RowBatch]]]:
    """Units with their rows. Pieces of one row group that follow each other are decoded in one pass: use up the rows of
    a unit before the next is asked for (what is left of them is skipped)."""
    for run in _runs(units):
        first = run[0]
        known = stamps.get(first.uri) if stamps else None
        if len(run) == 1:
            yield first, read_unit(first, stamp=known, columns=columns, batch_rows=batch_rows)
            continue
        total = sum(unit.rows or 0 for unit in run)
        batches = _Stream(_parquet(first, total, _version(first, known), columns, batch_rows))
        for unit in run:
            mine = batches.take(unit.rows or 0)
            yield unit, mine
            for _ in mine:
                pass


def unit_hash(unit: Unit) -> str:
    """xxh3-128 of the bytes a unit is read from, and of what else decides its rows; not of the file's name or time."""
    version = _version(unit, None)
    if unit.format == "reasoning-gym":
        content = f"{unit.uri} {version}"
    elif unit.row_group is not None:
        content = groups_hash(unit, version)
    else:
        start, end = (unit.start, unit.end) if unit.format == "jsonl" else (0, stamp(unit.uri).size)
        content = _range_hash(unit.uri, version, start, end, unit.format == "jsonl" and is_remote(unit.uri))
    return xxhash.xxh3_128_hexdigest(f"{unit.format} {content} {unit.offset} {unit.rows}".encode())


@lru_cache(64)
def _range_hash(uri: str, version: str, start: int, end: int, keep: bool) -> str:
    if keep:
        return xxhash.xxh3_128_hexdigest(fetched(uri, version, start, end))
    return hash_range(uri, start, end).hex()


def _version(unit: Unit, expected: Stamp | None) -> str:
    if unit.format == "reasoning-gym":
        return puzzle_version()
    found = stamp(unit.uri)
    if expected is not None and found != expected:
        raise UserError(
            f"{shown(unit.uri)}: changed since it was listed ({expected.size} bytes then, {found.size} now); run again"
        )
    return f"{found.size} {found.version}"


def _runs(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Units that go on where the one before ends, in the same row group."""
    run: list[Unit] = []
    for unit in units:
        if run and not (
            unit.row_group is not None
            and (unit.uri, unit.row_group) == (run[-1].uri, run[-1].row_group)
            and unit.offset == run[-1].offset + (run[-1].rows or 0)
        ):
            yield run
            run = []
        run.append(unit)
    if run:
        yield run


def _parquet(unit: Unit, rows: int, version: str, columns: Sequence[str] | None, batch_rows: int) -> Iterator[RowBatch]:
    number = first_number(footer(unit.uri, version), unit)
    name = shown(unit.uri)
    for batch in read_groups(unit, rows, version=version, columns=columns, batch_rows=batch_rows):
        yield table_batches(batch, name=name, first=number)
        number += batch.num_rows


class _Stream:
    """Batches of which pieces are taken, cut where a piece ends."""

    def __init__(self, batches: Iterator[RowBatch]):
        self._batches = batches
        self._rest: RowBatch | None = None

    def take(self, rows: int) -> Iterator[RowBatch]:
        while rows:
            batch = next(self._batches) if self._rest is None else self._rest
            size = len(batch) + len(batch.bad)
            batch, self._rest = (batch, None) if size <= rows else _cut(batch, rows)
            rows -= len(batch) + len(batch.bad)
            yield batch


def _cut(batch: RowBatch, rows: int) -> tuple[RowBatch, RowBatch]:
    """The first `rows` rows, good and bad, and the others."""
    numbers = np.sort(np.concatenate([batch.numbers, [bad.row for bad in batch.bad]]).astype(np.int64))
    last = numbers[rows - 1]
    good = int(np.searchsorted(batch.numbers, last, side="right"))

    def part(start: int, end: int | None, bad: list) -> RowBatch:
        table = None if batch.table is None else batch.table.slice(start, None if end is None else end - start)
        dicts = None if batch.dicts is None else batch.dicts[start:end]
        return RowBatch(batch.file, batch.numbers[start:end], table, dicts, bad)

    first = part(0, good, [bad for bad in batch.bad if bad.row <= last])
    return first, part(good, None, [bad for bad in batch.bad if bad.row > last])


def _arrow(unit: Unit, version: str, columns: Sequence[str] | None, batch_rows: int) -> Iterator[RowBatch]:
    table = arrow_table(unit.uri, version).slice(unit.offset, unit.rows)
    if columns is not None:
        table = table.select([name for name in columns if name in table.column_names])
    number = unit.offset + 1
    for batch in table.to_batches(max_chunksize=batch_rows):
        yield table_batches(batch, name=unit.uri, first=number)
        number += batch.num_rows


@lru_cache(4)
def arrow_table(uri: str, version: str) -> "pa.Table":
    """An Arrow file on this machine, file or stream format, mapped and not read: `datasets` caches are larger than the
    memory, and a piece of one costs nothing to find this way."""
    import pyarrow as pa

    path = local_path(uri)
    assert path is not None
    try:
        mapped = pa.memory_map(str(path))
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        table = (pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)).read_all()
        _ = table.column_names  # names that are not UTF-8 are damage, too
        return table
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise UserError(f"{uri}: damaged Arrow file: {(str(error).splitlines() or [''])[0]}") from None


def _lines(unit: Unit, version: str, batch_rows: int) -> Iterator[RowBatch]:
    """Numbers count from the file's first line; in a remote file, of which only the unit is fetched, from the unit."""
    name, first = shown(unit.uri), 1
    if unit.start and is_remote(unit.uri):
        name = f"{name} from byte {unit.start}"
    elif unit.start:
        first += _lines_before(unit.uri, version, unit.start)
    with _opened(unit, version) as file:
        at = unit.start

        def read(size: int) -> bytes:
            nonlocal at
            block = file.read(min(size, unit.end - at))
            if not block and at < unit.end:
                raise UserError(f"{name}: ends at byte {at}, expected {unit.end}: it was changed or cut off")
            at += len(block)
            return block

        yield from parse_lines(split_lines(read, name), name=name, first=first, batch_rows=batch_rows)


def _opened(unit: Unit, version: str) -> BinaryIO:
    if is_remote(unit.uri):
        return io.BytesIO(fetched(unit.uri, version, unit.start, unit.end))
    file = open_file(unit.uri)
    file.seek(unit.start)
    return file


_counted: dict[tuple[str, str], tuple[int, int]] = {}


def _lines_before(uri: str, version: str, end: int) -> int:
    """Ends of lines before a byte, counted on from where this process last counted in the file."""
    start, lines = _counted.get((uri, version), (0, 0))
    if start > end:
        start = lines = 0
    with open_file(uri) as file:
        file.seek(start)
        while start < end and (block := file.read(min(BLOCK_BYTES, end - start))):
            lines += block.count(b"\n")
            start += len(block)
    _counted[uri, version] = (start, lines)
    return lines


def _whole(unit: Unit, batch_rows: int) -> Iterator[RowBatch]:
    with open_file(unit.uri) as file:
        batches = read_file(file, unit.format, name=shown(unit.uri), batch_rows=batch_rows)
        yield from batches if unit.rows is None else _first(batches, unit.rows)


def _first(batches: Iterable[RowBatch], rows: int) -> Iterator[RowBatch]:
    """Batches up to this many rows, good and bad."""
    for batch in islice(batches, rows):
        size = len(batch) + len(batch.bad)
        if size > rows:
            batch, _ = _cut(batch, rows)
        yield batch
        rows -= min(size, rows)
        if not rows:
            return
