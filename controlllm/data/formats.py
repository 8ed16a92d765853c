"""What a file is, by its name and its first bytes, and its rows in batches; a bad row is set aside with its place."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
import orjson
import pyarrow as pa

from controlllm.data.lines import Collector, decode_fault, nul_fault, parse_lines, split_lines
from controlllm.data.location import shown
from controlllm.data.separated import read_csv
from controlllm.data.types import Row, RowBatch
from controlllm.errors import UserError

TEXT = ("jsonl", "json", "csv", "tsv", "txt", "yaml")
BINARY = ("parquet", "arrow", "avro")
COMPRESSIONS = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}
_ALIASES = {"ndjson": "jsonl", "yml": "yaml", "feather": "arrow"}
_SIGNS = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"PAR1": "parquet", b"ARROW1": "arrow",
    b"Obj\x01": "avro", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
_FOREIGN = {
    **{bytes([0x80, protocol]): "a pickle, which could run code when it is read" for protocol in (2, 3, 4, 5)},
    b"PK\x03\x04": "a zip archive", b"%PDF-": "a PDF", b"<!doctype": "an HTML page", b"<html": "an HTML page",
}  # fmt: skip
_LFS_POINTER = b"version https://git-lfs"


def format_of(name: str) -> str:
    """`jsonl`, `csv.gz`, ... by the ending of a file's name."""
    base, _, last = name.rpartition("/")[2].rpartition(".")
    last = last.lower()
    compression = f".{last}" if last in COMPRESSIONS else ""
    ending = base.rpartition(".")[2].lower() if compression else last
    ending = _ALIASES.get(ending, ending)
    if ending not in TEXT and (compression or ending not in BINARY):
        known = ", ".join(f".{ending}" for ending in (*TEXT, *BINARY))
        raise UserError(
            f"{shown(name)}: format not known by its name; known: {known} (and .gz, .zst, .bz2 of the text formats)"
        )
    return ending + compression


def check_signature(start: bytes, format: str, name: str) -> None:
    """UserError where a file's first bytes tell that it is not what its name says."""
    if not start:
        raise UserError(f"{name}: the file is empty")
    kind, _, compression = format.partition(".")
    _refuse_foreign(start, kind, name)
    found = next((what for sign, what in _SIGNS.items() if start.startswith(sign)), None)
    if compression and found != COMPRESSIONS[compression]:
        raise UserError(f"{name}: damaged {COMPRESSIONS[compression]} file, or none: it does not begin like one")
    if compression or found in (None, kind) or kind == "parquet":
        return
    if found == "UTF-16":
        # A broken line may begin with these two bytes; UTF-16 has a zero in nearly every other one.
        if b"\0" in start:
            raise UserError(f"{name}: is UTF-16 text; convert it to UTF-8")
        return
    if found in COMPRESSIONS.values():
        ending = next(ending for ending, what in COMPRESSIONS.items() if what == found)
        raise UserError(f"{name}: is {found}-compressed: name it .{kind}.{ending}")
    raise UserError(f"{name}: is {found} and not {kind}: name it .{found}")


def _refuse_foreign(start: bytes, kind: str, name: str) -> None:
    if start.startswith(_LFS_POINTER):
        raise UserError(f"{name}: is a pointer of Git LFS and not the file itself; get it with git lfs pull")
    if kind == "txt" and start.lower().startswith(b"<"):  # a page is text, too
        return
    found = next((what for sign, what in _FOREIGN.items() if start[:16].lower().startswith(sign.lower())), None)
    if found:
        raise UserError(f"{name}: is {found}, and not {kind}")
    if kind == "jsonl" and start.lstrip().partition(b"\n")[0].strip() in (b"[", b"{"):
        raise UserError(f"{name}: is one JSON document over several lines: name it .json")


def read_file(file: BinaryIO, format: str, *, name: str, batch_rows: int) -> Iterator[RowBatch]:
    """All rows of an opened file of any format but parquet, at most `batch_rows` to a batch.

    Damage that makes the rest unreadable is a UserError.
    """
    kind, _, compression = format.partition(".")
    stream: Any = file
    if compression:
        stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), COMPRESSIONS[compression])
    try:
        yield from _READERS[kind](stream, name, batch_rows)
    except OSError as error:
        if not compression:
            raise
        raise UserError(f"{name}: damaged {COMPRESSIONS[compression]} file: {_first_line(error)}") from None


def table_batches(batch: pa.RecordBatch, *, name: str, first: int) -> RowBatch:
    """A stretch of a columnar file, whose first row has the number `first`; rows of text that is not UTF-8 are bad."""
    numbers = np.arange(first, first + batch.num_rows, dtype=np.int64)
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        return _without_invalid(batch, name, numbers)
    return RowBatch(name, numbers, table=pa.Table.from_batches([batch]))


def _without_invalid(batch: pa.RecordBatch, name: str, numbers: np.ndarray) -> RowBatch:
    collector = Collector(name)
    keep = np.ones(batch.num_rows, bool)
    for i in range(batch.num_rows):
        for field, column in zip(batch.schema.names, batch.slice(i, 1).columns, strict=True):
            try:
                column.validate(full=True)
            except pa.ArrowInvalid as error:
                keep[i] = False
                collector.refuse(int(numbers[i]), _first_line(error), field=field)
                break
    table = pa.Table.from_batches([batch]).filter(pa.array(keep))
    return RowBatch(name, numbers[keep], table=table, bad=collector.bad)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _jsonl(stream: Any, name: str, batch_rows: int) -> Iterator[RowBatch]:
    return parse_lines(split_lines(stream.read, name), name=name, first=1, batch_rows=batch_rows)


def _json(stream: Any, name: str, batch_rows: int) -> Iterator[RowBatch]:
    content = stream.read()
    try:
        rows = orjson.loads(content.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        if fault := decode_fault(content):
            raise UserError(f"{name}: {fault}") from None
        raise UserError(f"{name}:{error.lineno}: not valid JSON: {error.msg.partition(': line')[0]}") from None
    collector = Collector(name)
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        if isinstance(row, dict):
            collector.add(number, row)
        else:
            collector.refuse(number, f"a row is an object of fields, found {type(row).__name__}")
        if len(collector) == batch_rows:
            yield collector.take()
    yield collector.take()


def _arrow(stream: Any, name: str, batch_rows: int) -> Iterator[RowBatch]:
    source = pa.PythonFile(stream, "r")
    number = 1
    try:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        _ = reader.schema.names  # names that are not UTF-8 are damage, too
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            for start in range(0, batch.num_rows, batch_rows):
                piece = batch.slice(start, batch_rows)
                yield table_batches(piece, name=name, first=number)
                number += piece.num_rows
    except (pa.ArrowException, OSError, EOFError, ValueError, MemoryError) as error:
        raise UserError(f"{name}: damaged Arrow file after row {number - 1}: {_first_line(error)}") from None


def _avro(stream: Any, name: str, batch_rows: int) -> Iterator[RowBatch]:
    import fastavro

    number = 0
    try:
        rows = iter(fastavro.reader(stream))
        while some := list(islice(rows, batch_rows)):
            for row in some:
                if not isinstance(row, dict):
                    raise UserError(f"{name}: its schema is not a record of fields")
            yield _numbered(name, number + 1, some)  # type: ignore[arg-type] - just checked
            number += len(some)
    except UserError:
        raise
    except Exception as error:  # the library checks little, and stumbles over damage in every way
        raise UserError(f"{name}: damaged Avro file after row {number} or later: {_first_line(error)}") from error


def _numbered(name: str, first: int, rows: list[Row]) -> RowBatch:
    return RowBatch(name, np.arange(first, first + len(rows), dtype=np.int64), dicts=rows)


def _txt(stream: Any, name: str, batch_rows: int) -> Iterator[RowBatch]:
    content = stream.read().removeprefix(b"\xef\xbb\xbf")
    collector = Collector(name)
    if fault := decode_fault(content) or nul_fault(content):
        collector.refuse(1, fault, field="text")
    else:
        collector.add(1, {"text": content.decode()})
    yield collector.take()


def _yaml(stream: Any, name: str, batch_rows: int) -> Iterator[RowBatch]:
    import yaml

    content = stream.read()
    if fault := decode_fault(content):
        raise UserError(f"{name}: {fault}")
    try:
        row = yaml.safe_load(content.decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no such date
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    collector = Collector(name)
    if isinstance(row, dict):
        collector.add(1, row)
    else:
        collector.refuse(1, f"a row is a mapping of fields, found {type(row).__name__}")
    yield collector.take()


_READERS: dict[str, Callable[[Any, str, int], Iterator[RowBatch]]] = {
    "jsonl": _jsonl, "json": _json, "csv": read_csv, "tsv": partial(read_csv, delimiter="\t"),
    "arrow": _arrow, "avro": _avro, "txt": _txt, "yaml": _yaml,
}  # fmt: skip
