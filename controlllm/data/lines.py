"""Lines of JSON as batches of rows; a line that is no row is set aside with its number and the reason."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import orjson

from controlllm.data.types import BadRow, Row, RowBatch
from controlllm.errors import UserError

BLOCK_BYTES = 1 << 22
LONGEST_LINE = 1 << 28
BOM = b"\xef\xbb\xbf"


class Collector:
    """Rows and bad rows of one file, until they are taken as a batch."""

    def __init__(self, name: str):
        self.name = name
        self.numbers: list[int] = []
        self.rows: list[Row] = []
        self.bad: list[BadRow] = []

    def __len__(self) -> int:
        return len(self.rows) + len(self.bad)

    def add(self, number: int, row: Row) -> None:
        self.numbers.append(number)
        self.rows.append(row)

    def refuse(self, number: int, reason: str, *, field: str | None = None) -> None:
        self.bad.append(BadRow(self.name, number, field, reason))

    def take(self) -> RowBatch:
        batch = RowBatch(self.name, np.array(self.numbers, np.int64), dicts=self.rows, bad=self.bad)
        self.numbers, self.rows, self.bad = [], [], []
        return batch


def split_lines(read: Callable[[int], bytes], name: str) -> Iterator[list[bytes]]:
    """Lines without their ends, some at a time, of what `read(size)` gives until it gives nothing."""
    rest = b""
    while block := read(BLOCK_BYTES):
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        if len(rest) > LONGEST_LINE:
            raise UserError(f"{name}: a line is longer than 256 MB; if this is one JSON document, name it .json")
        yield lines
    if rest:
        yield [rest]


def parse_lines(blocks: Iterable[list[bytes]], *, name: str, first: int, batch_rows: int) -> Iterator[RowBatch]:
    """Rows of lines, of which the first has the number `first`. Blank lines are no rows."""
    collector = Collector(name)
    loads, add = orjson.loads, collector.add
    number = first - 1
    for lines in blocks:
        if number == 0 and lines and lines[0].startswith(BOM):
            lines[0] = lines[0].removeprefix(BOM)
        for line in lines:
            number += 1
            try:
                row = loads(line)
            except orjson.JSONDecodeError as error:
                if line and not line.isspace():
                    collector.refuse(number, _reason(line, error))
                continue
            if type(row) is dict:
                add(number, row)
            else:
                collector.refuse(number, f"a row is an object of fields, found {type(row).__name__}")
            if len(collector) >= batch_rows:
                yield collector.take()
    if len(collector):
        yield collector.take()


def decode_fault(content: bytes) -> str | None:
    """Where bytes are not UTF-8, None if they are."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 text: byte 0x{content[error.start]:02x} at column {error.start + 1}"
    return None


def nul_fault(content: bytes) -> str | None:
    """Where a NUL byte stands: a hole in a file, or another encoding; None if there is none."""
    at = content.find(b"\0")
    return f"NUL byte at column {at + 1}" if at >= 0 else None


def decoded(text: str) -> bool:
    """Whether text that was read with surrogateescape had nothing to escape."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason(line: bytes, error: orjson.JSONDecodeError) -> str:
    if fault := decode_fault(line):
        return fault
    if fault := nul_fault(line):
        return f"not valid JSON: {fault}"
    return f"not valid JSON: {error.msg.partition(': line')[0]} at column {error.colno}"
