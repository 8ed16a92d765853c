"""What passes between the steps of preparing data: units, batches of rows, documents, tokens, and rows that are bad."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

Row = dict[str, Any]
Message = dict[str, Any]
"""`role` and `content`, and what a template may know beside them: `tool_calls`, `name`, `thinking`, ..."""
Conversation = dict[str, Any]
"""`messages`, and `tools` (JSON schemas) where the template is to show them."""
Document = str | list[Message] | Conversation
TEXT: tuple[str, ...] = ()
"""The shape of a document that is plain text."""


@dataclass(frozen=True)
class Stamp:
    """What tells that a file is still the same without reading it."""

    size: int
    version: str
    """ETag, checksum or modification time, as the file's home gives it."""


@dataclass(frozen=True)
class Unit:
    """A piece of one source file that is read by itself, and becomes one shard.

    Parquet: `rows` rows from `offset` on in a row group, or `row_groups` whole ones. Arrow: `rows` from `offset` on.
    Lines of text: the lines in bytes [start, end). Any other format: the whole file, up to `rows` rows.
    """

    uri: str
    format: str
    start: int
    end: int
    row_group: int | None = None
    row_groups: int = 1
    offset: int = 0
    rows: int | None = None
    """Number of rows, where it is known without reading them; in a file read whole, the most that are taken."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, kept aside with its place and the reason."""

    file: str
    row: int
    """1-based; the line in formats of lines."""
    field: str | None
    reason: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.row}"
        return f"{where}: field '{self.field}': {self.reason}" if self.field else f"{where}: {self.reason}"


@dataclass
class RowBatch:
    """Rows of one unit, either as a table (columnar formats) or as dictionaries (formats of lines)."""

    file: str
    numbers: np.ndarray  # (rows,) int64, as in BadRow.row
    table: pa.Table | None = None
    dicts: list[Row] | None = None
    bad: list[BadRow] = field(default_factory=list)  # rows of this stretch that could not be read

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self) -> list[Row]:
        """As dictionaries, whatever they were."""
        if self.dicts is not None:
            return self.dicts
        assert self.table is not None, "a batch has rows of one kind"
        return self.table.to_pylist()


@dataclass
class Documents:
    """Documents side by side, flat: what the templates are filled with, without an object per row.

    Document i has the contents `contents[offsets[i]:offsets[i + 1]]` in the order of `shapes[shape[i]]`, its roles.
    Plain text has the shape `TEXT` and one content. A document that needs the template itself (tools, tool calls,
    thinking, contents in parts) stands whole in `whole[i]` and has no contents here.
    """

    contents: list[str]
    offsets: np.ndarray  # (documents + 1,) int64
    shape: np.ndarray  # (documents,) int32, index into `shapes`
    shapes: list[tuple[str, ...]]
    numbers: np.ndarray  # (documents,) int64, number of the row that each came from
    whole: dict[int, Document] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: int) -> Document:
        """One document as plain data."""
        if index in self.whole:
            return self.whole[index]
        contents = self.contents[self.offsets[index] : self.offsets[index + 1]]
        roles = self.shapes[self.shape[index]]
        if roles == TEXT:
            return contents[0]
        return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]

    @classmethod
    def of(cls, documents: Sequence[Document], numbers: np.ndarray) -> "Documents":
        """From one object per row."""
        contents: list[str] = []
        ends: list[int] = [0]
        shapes: dict[tuple[str, ...], int] = {}
        shape: list[int] = []
        whole: dict[int, Document] = {}
        for i, document in enumerate(documents):
            roles: tuple[str, ...] = TEXT
            if isinstance(document, str):
                contents.append(document)
            elif isinstance(document, list) and all(map(_is_plain, document)):
                contents += [message["content"] for message in document]
                roles = tuple([message["role"] for message in document])
            else:
                whole[i] = document
            ends.append(len(contents))
            shape.append(shapes.setdefault(roles, len(shapes)))
        offsets, shape_of, of_rows = (
            np.asarray(ends, np.int64),
            np.asarray(shape, np.int32),
            np.asarray(numbers, np.int64),
        )
        return cls(contents, offsets, shape_of, list(shapes), of_rows, whole)


def _is_plain(message: Message) -> bool:
    return len(message) == 2 and "role" in message and isinstance(message.get("content"), str)


@dataclass
class TokenBatch:
    """Documents as tokens, flat."""

    ids: np.ndarray  # (tokens,) uint32
    target: np.ndarray  # (tokens,) bool
    offsets: np.ndarray  # (documents + 1,) int64
    index: np.ndarray  # (documents,) int64, which of the `Documents` each one is
    bad: list[tuple[int, str]] = field(default_factory=list)  # index of a document that gives no tokens, and why

    def __len__(self) -> int:
        return len(self.index)
