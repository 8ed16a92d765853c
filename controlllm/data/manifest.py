"""What a source consists of: its files with their stamps, cut into units of about so many rows."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain, repeat
from typing import Any

from controlllm.data.formats import check_signature, format_of
from controlllm.data.generated import puzzle_unit, puzzle_version
from controlllm.data.hub import hub_files
from controlllm.data.location import is_remote, kind_of, list_files, open_file, read_bytes, shown, stamp
from controlllm.data.parquet import footer, span
from controlllm.data.sources import GYM
from controlllm.data.types import Stamp, Unit
from controlllm.data.units import arrow_table, read_unit, read_units, unit_hash
from controlllm.errors import UserError

__all__ = ["Manifest", "SourceFile", "list_source", "read_unit", "read_units", "unit_hash"]

THREADS = 8
SAMPLE_BYTES = 1 << 20
LOOK_AHEAD_BYTES = 1 << 16


def _is_counted(unit: Unit) -> bool:
    return unit.row_group is not None or unit.format in ("arrow", "reasoning-gym")


@dataclass(frozen=True)
class SourceFile:
    """One file, and the units it is read in."""

    uri: str
    format: str
    stamp: Stamp
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Manifest:
    """The files of a source, by name."""

    source: str
    files: tuple[SourceFile, ...]

    @property
    def units(self) -> list[Unit]:
        return [unit for file in self.files for unit in file.units]

    @property
    def rows(self) -> int | None:
        """None where they are not known without reading them."""
        counts = [unit.rows if _is_counted(unit) else None for unit in self.units]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def bytes(self) -> int:
        return sum(file.stamp.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Manifest":
        files = (
            SourceFile(f["uri"], f["format"], Stamp(**f["stamp"]), tuple(Unit(**unit) for unit in f["units"]))
            for f in data["files"]
        )
        return cls(data["source"], tuple(files))


def list_source(source: str, *, unit_rows: int, rows: int | None = None, seed: int = 0) -> Manifest:
    """The units of a source, in order of the files' names: the first has a quarter of `unit_rows`, to be there soon.

    `rows` takes only so many from the beginning, bad rows among them. `seed` is for procedural sources. A piece at a
    file's end that has less than half the rows that were wanted belongs to the one before it.
    """
    if source.startswith(GYM):
        unit = puzzle_unit(source, rows=rows, seed=seed)
        return Manifest(source, (SourceFile(unit.uri, unit.format, Stamp(0, puzzle_version()), (unit,)),))
    uris = hub_files(source) if kind_of(source) == "hf" else list_files(source)
    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(_look, uris))
    small = sum(file.rows for file in found) <= unit_rows
    sizes = repeat(1 << 62) if small else chain([max(unit_rows // 4, 1)], repeat(unit_rows))
    wanted = _Wanted(sizes)
    files = [SourceFile(f.uri, f.format, f.stamp, tuple(_cut(f, wanted))) for f in found]
    if not any(file.units for file in files):
        raise UserError(f"{shown(source)}: holds no rows")
    return Manifest(source, tuple(files if rows is None else _limited(files, rows)))


@dataclass(frozen=True)
class _Found:
    """A file before it is cut; `groups` are the rows of its row groups, `rows` may be an estimate."""

    uri: str
    format: str
    stamp: Stamp
    rows: float
    groups: tuple[int, ...] = ()


def _look(uri: str) -> _Found:
    format, mark = format_of(uri), stamp(uri)
    version = f"{mark.size} {mark.version}"
    if mark.size == 0:
        raise UserError(f"{shown(uri)}: the file is empty")
    start = read_bytes(uri, 0, min(SAMPLE_BYTES if format == "jsonl" else 64, mark.size))
    check_signature(start, format, shown(uri))
    if format == "parquet":
        metadata = footer(uri, version)
        groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        return _Found(uri, format, mark, sum(groups), groups)
    if format == "arrow" and not is_remote(uri):
        rows = arrow_table(uri, version).num_rows
        return _Found(uri, format, mark, rows, (rows,))
    if format == "jsonl":
        lines = sum(1 for line in start.split(b"\n") if line.strip())
        return _Found(uri, format, mark, max(lines * mark.size / len(start), 1))
    return _Found(uri, format, mark, 1)


class _Wanted:
    """How many rows the next unit is to have."""

    def __init__(self, sizes: Iterator[int]):
        self._sizes = sizes
        self.now = next(sizes)

    def advance(self) -> None:
        self.now = next(self._sizes)


def _cut(file: _Found, wanted: _Wanted) -> Iterator[Unit]:
    if file.format == "parquet":
        return _cut_parquet(file, wanted)
    if file.groups:
        ranges = _pieces(file.groups[0], wanted)
        return (Unit(file.uri, file.format, 0, file.stamp.size, offset=at, rows=rows) for at, rows in ranges)
    if file.format == "jsonl":
        return _cut_lines(file, wanted)
    wanted.advance()
    return iter([Unit(file.uri, file.format, 0, file.stamp.size)])


def _pieces(rows: int, wanted: _Wanted) -> Iterator[tuple[int, int]]:
    """Where each piece begins, and its length."""
    at = 0
    while at < rows:
        size = min(wanted.now, rows - at)
        wanted.advance()
        if rows - at - size < wanted.now / 2:
            size = rows - at
        yield at, size
        at += size


def _cut_parquet(file: _Found, wanted: _Wanted) -> Iterator[Unit]:
    """Row groups are cut where they are larger than wanted, and joined where they are smaller."""
    metadata = footer(file.uri, f"{file.stamp.size} {file.stamp.version}")
    left = sum(file.groups)
    last: Unit | None = None
    for group, rows in enumerate(file.groups):
        here = Unit(file.uri, file.format, *span(metadata, group), row_group=group, rows=rows)
        is_rest, left = left < wanted.now / 2, left - rows
        if last and ((last.rows or 0) + rows <= wanted.now or is_rest):
            last = _joined(last, here)
            continue
        if not rows:
            continue
        if last:
            yield last
            wanted.advance()
        last = here if rows <= wanted.now else None
        if last is None:
            yield from (replace(here, offset=at, rows=size) for at, size in _pieces(rows, wanted))
    if last:
        yield last
        wanted.advance()


def _joined(unit: Unit, following: Unit) -> Unit:
    rows = (unit.rows or 0) + (following.rows or 0)
    return replace(unit, end=max(unit.end, following.end), row_groups=unit.row_groups + 1, rows=rows)


def _cut_lines(file: _Found, wanted: _Wanted) -> Iterator[Unit]:
    """By the bytes that so many rows take on average, on to the end of a line."""
    size = file.stamp.size
    row_bytes = size / file.rows
    start = 0
    while start < size:
        end = start + int(wanted.now * row_bytes)
        wanted.advance()
        end = size if size - end < wanted.now * row_bytes / 2 else _line_end(file.uri, end, size)
        yield Unit(file.uri, file.format, start, end)
        start = end


def _line_end(uri: str, at: int, size: int) -> int:
    """Where the line that byte `at - 1` is in ends."""
    at = max(at - 1, 0)
    while at < size:
        block = read_bytes(uri, at, min(at + LOOK_AHEAD_BYTES, size))
        if (found := block.find(b"\n")) >= 0:
            return at + found + 1
        at += LOOK_AHEAD_BYTES
    return size


def _limited(files: list[SourceFile], rows: int) -> Iterator[SourceFile]:
    """The files up to `rows` rows: units that are beyond are left out, the one in which the last row is ends there."""
    for file in files:
        kept = []
        for unit in file.units:
            if rows:
                unit, taken = _shortened(unit, rows)
                rows -= taken
                kept.append(unit)
        if kept:
            yield replace(file, units=tuple(kept))


def _shortened(unit: Unit, rows: int) -> tuple[Unit, int]:
    if _is_counted(unit) and unit.rows is not None:
        taken = min(unit.rows, rows)
        return replace(unit, rows=taken), taken
    if unit.format == "jsonl":
        end, taken = _rows_end(unit, rows)
        return replace(unit, end=end), taken
    unit = replace(unit, rows=rows)
    return unit, sum(len(batch) + len(batch.bad) for batch in read_unit(unit))


def _rows_end(unit: Unit, rows: int) -> tuple[int, int]:
    """The byte at which that many lines with something in them end, and how many there are up to there."""
    at, taken = unit.start, 0
    with open_file(unit.uri) as file:
        file.seek(unit.start)
        while at < unit.end and taken < rows:
            line = file.readline()
            at += len(line)
            taken += bool(line.strip())
    return at, taken
