"""Separated values as batches of rows."""

import csv
import io
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from controlllm.data.lines import Collector, decoded
from controlllm.data.types import RowBatch
from controlllm.errors import UserError


def read_csv(stream: Any, name: str, batch_rows: int, delimiter: str = ",") -> Iterator[RowBatch]:
    """Records of separated values, all of them text; line breaks within quotes belong to the value."""
    csv.field_size_limit(sys.maxsize)  # the module's limit of 128 KB is less than a long document
    text = io.TextIOWrapper(
        cast(BinaryIO, _Readable(stream)), encoding="utf-8-sig", errors="surrogateescape", newline=""
    )
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header = _header(reader, name)
    collector = Collector(name)
    for number, fields in _records(reader, collector):
        if len(fields) != len(header):
            if fields:
                collector.refuse(number, f"found {len(fields)} fields, the header has {len(header)}")
        elif column := next((h for h, f in zip(header, fields, strict=True) if not decoded(f)), None):
            collector.refuse(number, "not UTF-8 text", field=column)
        elif column := next((h for h, f in zip(header, fields, strict=True) if "\0" in f), None):
            collector.refuse(number, "holds a NUL byte", field=column)
        else:
            collector.add(number, dict(zip(header, fields, strict=True)))
        if len(collector) >= batch_rows:
            yield collector.take()
    yield collector.take()


def _header(reader: Any, name: str) -> list[str]:
    try:
        header = next((fields for fields in reader if fields), [])
    except csv.Error as error:
        raise UserError(f"{name}:1: the header cannot be read: {error}") from None
    if twice := next((field for field in header if header.count(field) > 1), None):
        raise UserError(f"{name}:1: the header names the column '{twice}' twice")
    return header


def _records(reader: Any, collector: Collector) -> Iterator[tuple[int, list[str]]]:
    """Records with the line that each begins in; one that breaks the rules of quotes is bad."""
    while True:
        number = reader.line_num + 1
        try:
            yield number, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            collector.refuse(number, f"not valid CSV: {error}")


class _Readable(io.RawIOBase):
    """What TextIOWrapper needs of a stream, for pyarrow's too."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(size)

    read1 = read
