"""Rows of the common forms straight from Arrow columns: no object per row, the same result as row by row."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from controlllm.data.forms import SHAREGPT_ROLES, Names
from controlllm.data.messages import EXTRAS, ROLES, SAME_ROLES
from controlllm.data.types import TEXT, Documents

# A row's roles as one number, 3 bits each and a 1 before the first: this many fit into 64 bits.
MAX_TURNS = 20
ASSISTANT = ROLES.index("assistant")


@dataclass
class Plain:
    """What could be read of a table. Rows with anything unusual are left to the reading row by row."""

    rows: np.ndarray  # (documents,) int64, index of the row of each document
    documents: Documents


Texts = tuple[list[str | None], np.ndarray]  # a column, and which of its values have words


def read_columns(form: str, table: pa.Table, names: Names, asked: frozenset[str], numbers: np.ndarray) -> Plain | None:
    """The plain rows of a table, or None where the columns are not of the usual types.

    Raises UnicodeDecodeError where a column holds other bytes than UTF-8.
    """
    return _READERS[form](table, names, asked, numbers)


def _messages(table: pa.Table, names: Names, asked: frozenset[str], numbers: np.ndarray) -> Plain | None:
    fields = (names["messages"], names["role"], names["content"])
    return _conversations(table, fields, SAME_ROLES, _absent(table, names, asked, ("tools",)), numbers)


def _sharegpt(table: pa.Table, names: Names, asked: frozenset[str], numbers: np.ndarray) -> Plain | None:
    fields = (names["conversations"], names["from"], names["value"])
    return _conversations(table, fields, SHAREGPT_ROLES, _absent(table, names, asked, ("system", "tools")), numbers)


def _conversations(
    table: pa.Table, fields: tuple[str, str, str], roles: dict[str, str], usable: np.ndarray | None, numbers: np.ndarray
) -> Plain | None:
    turns = _list_of_structs(table, *fields)
    if usable is None or turns is None:
        return None
    starts, role, content, unusual = turns  # `starts`: (rows + 1,) into the messages
    contents = content.to_pylist()
    missing = np.zeros(len(contents), bool)
    if content.null_count:
        missing = np.fromiter((c is None for c in contents), bool, len(contents))
        blank = np.fromiter(map(_is_blank, contents), bool, len(contents))
    else:  # the same, without a call of ours for each
        blank = np.fromiter(map(str.isspace, contents), bool, len(contents))
        blank |= np.fromiter(map(len, contents), np.int64, len(contents)) == 0
    code = _role_codes(role, roles)
    wrong = unusual | (code < 0) | missing
    wrong |= blank & (code == ASSISTANT)
    counts = np.diff(starts)
    usable = usable & (_per_row(wrong, starts) == 0) & (_per_row(code == ASSISTANT, starts) > 0) & (counts <= MAX_TURNS)
    rows = np.flatnonzero(usable & _valid(table, fields[0]))
    shape, shapes = _shapes(code, starts, rows)
    if len(rows) < len(table) or len(contents) != starts[-1]:
        contents = _ranges(contents, starts[rows], counts[rows])
    offsets = np.concatenate(([0], np.cumsum(counts[rows])))
    return Plain(rows, Documents(contents, offsets, shape, shapes, numbers[rows]))  # type: ignore[arg-type]


def _alpaca(table: pa.Table, names: Names, asked: frozenset[str], numbers: np.ndarray) -> Plain | None:
    given = _optional_texts(table, "input", names, asked)
    prompts = _texts(table, names["instruction"])
    if given is None or prompts is None:
        return None
    texts, (inputs, filled) = list(prompts[0]), given
    for row in np.flatnonzero(filled):
        texts[row] = f"{texts[row]}\n\n{inputs[row]}" if texts[row] is not None else None
    return _single_turn(table, texts, names["output"], _optional_texts(table, "system", names, asked), numbers)


def _prompt_completion(table: pa.Table, names: Names, asked: frozenset[str], numbers: np.ndarray) -> Plain | None:
    prompts = _texts(table, names["prompt"])
    if prompts is None:
        return None
    system = _optional_texts(table, "system", names, asked)
    return _single_turn(table, prompts[0], names["completion"], system, numbers)


def _single_turn(
    table: pa.Table, prompts: list[str | None], answer: str, system: Texts | None, numbers: np.ndarray
) -> Plain | None:
    answers = _texts(table, answer)
    if system is None or answers is None:
        return None
    usable = answers[1] & np.fromiter((prompt is not None for prompt in prompts), bool, len(prompts))
    rows = np.flatnonzero(usable)
    with_system = system[1][rows]
    offsets = np.concatenate(([0], np.cumsum(2 + with_system)))
    contents = np.empty(offsets[-1], object)
    contents[offsets[:-1][with_system]] = _objects(system[0])[rows[with_system]]
    contents[offsets[1:] - 2] = _objects(prompts)[rows]
    contents[offsets[1:] - 1] = _objects(answers[0])[rows]
    shapes = [("user", "assistant"), ("system", "user", "assistant")]
    return Plain(rows, Documents(contents.tolist(), offsets, with_system.astype(np.int32), shapes, numbers[rows]))


def _text(table: pa.Table, names: Names, asked: frozenset[str], numbers: np.ndarray) -> Plain | None:
    texts = _texts(table, names["text"])
    if texts is None:
        return None
    rows = np.flatnonzero(texts[1])
    contents = texts[0] if len(rows) == len(table) else [texts[0][row] for row in rows]
    offsets = np.arange(len(rows) + 1)
    return Plain(rows, Documents(contents, offsets, np.zeros(len(rows), np.int32), [TEXT], numbers[rows]))  # type: ignore[arg-type]


_READERS: dict[str, Callable[[pa.Table, Names, frozenset[str], np.ndarray], Plain | None]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
}


def _column(table: pa.Table, name: str) -> pa.Array | None:
    if table.schema.get_field_index(name) < 0:
        return None
    column = table.column(name).combine_chunks()
    return pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _texts(table: pa.Table, name: str) -> Texts | None:
    column = _column(table, name)
    if column is None or not _is_text(column.type):
        return None
    values = column.to_pylist()
    return values, ~np.fromiter(map(_is_blank, values), bool, len(values))


def _optional_texts(table: pa.Table, field: str, names: Names, asked: frozenset[str]) -> Texts | None:
    """Like `_texts`; a field that nobody named need not be there, and may be all null."""
    if names[field] in table.column_names and not pa.types.is_null(table.schema.field(names[field]).type):
        return _texts(table, names[field])
    if field in asked and names[field] not in table.column_names:
        return None
    return [None] * len(table), np.zeros(len(table), bool)


def _absent(table: pa.Table, names: Names, asked: frozenset[str], fields: tuple[str, ...]) -> np.ndarray | None:
    """(rows,) bool: which rows have none of these fields; None where one that the recipe names is missing."""
    absent = np.ones(len(table), bool)
    for field in fields:
        if names[field] in table.column_names:
            absent &= ~_valid(table, names[field])
        elif field in asked:
            return None
    return absent


def _valid(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(table.column(name).is_valid())


def _list_of_structs(
    table: pa.Table, name: str, role: str, content: str
) -> tuple[np.ndarray, pa.Array, pa.Array, np.ndarray] | None:
    """(rows + 1,) starts, roles, contents, and which messages hold more than the two."""
    column = _column(table, name)
    if column is None or not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return None
    if not pa.types.is_struct(column.type.value_type):
        return None
    starts = column.offsets.to_numpy().astype(np.int64)
    values = column.values.slice(starts[0], starts[-1] - starts[0])
    children = dict(zip((field.name for field in values.type), values.flatten(), strict=True))
    if not {role, content} <= children.keys() or not all(_is_text(children[key].type) for key in (role, content)):
        return None
    unusual = np.zeros(len(values), bool)
    for extra in EXTRAS:
        if extra in children and extra not in (role, content):
            unusual |= np.asarray(children[extra].is_valid())
    return starts - starts[0], children[role], children[content], unusual


def _role_codes(role: pa.Array, roles: dict[str, str]) -> np.ndarray:
    """(messages,) int64: index into ROLES, -1 for one that is not known."""
    encoded = role.dictionary_encode()
    known = [ROLES.index(roles[name]) if name in roles else -1 for name in encoded.dictionary.to_pylist()]
    return np.asarray([*known, -1])[np.asarray(encoded.indices.fill_null(len(known)))]


def _shapes(code: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """(documents,) int32 and the shapes they point to."""
    place = np.arange(len(code)) - np.repeat(starts[:-1], np.diff(starts))
    bits = np.where((code >= 0) & (place < MAX_TURNS), code, 0).astype(np.uint64) << (3 * (place % 21)).astype(
        np.uint64
    )
    numbers = _per_row(bits, starts)[rows] + (np.uint64(1) << (3 * np.diff(starts)[rows]).astype(np.uint64))
    distinct, shape = np.unique(numbers, return_inverse=True)
    shapes = []
    for number in distinct.tolist():
        turns = (number.bit_length() - 1) // 3
        shapes.append(tuple(ROLES[number >> 3 * turn & 7] for turn in range(turns)))
    return shape.astype(np.int32), shapes


def _per_row(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(messages,) → (rows,), the sum over each row's messages."""
    kind = np.uint64 if values.dtype == np.uint64 else np.int64
    sums = np.concatenate((np.zeros(1, kind), np.cumsum(values, dtype=kind)))
    return sums[starts[1:]] - sums[starts[:-1]]


def _ranges(values: list[str | None], starts: np.ndarray, counts: np.ndarray) -> list[str | None]:
    """values[start : start + count] of each, one after another."""
    first = np.repeat(starts - np.concatenate(([0], np.cumsum(counts)[:-1])), counts) if len(starts) else starts
    return _objects(values)[first + np.arange(len(first))].tolist()


def _objects(values: list[str | None]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _is_blank(text: str | None) -> bool:
    return not text or text.isspace()
