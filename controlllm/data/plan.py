"""A chat template run once per shape of conversation, so that a row is then filled in without running it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np

from controlllm.data.content_use import ContentUse, StandIn, read_syntax
from controlllm.data.template import ChatTemplate, Rendered
from controlllm.data.types import Message

_SPACE = " \n\t"
# Nothing a template should do to contents but strip them: change case, escape, shorten, count, ...
_NASTY = (
    "Uq\"{i}\\n' <b>&amp; é中😀 {{{{ x }}}} %s\n\n  END",
    "  lower {i}\r\nUPPER\t\x1c",
    "\n\n# {i}. a|b[0] 'q'\u00a0",
    "x{i}",
    "9" * 40 + " {i}" + " word" * 300,
)


@dataclass(frozen=True)
class Filled:
    """Rows of one shape. Lengths and places are in UTF-8 bytes."""

    texts: list[str]
    sizes: np.ndarray  # (rows,) int64
    begins: np.ndarray  # (rows, spans) int64
    ends: np.ndarray  # (rows, spans) int64


@dataclass(frozen=True)
class Plan:
    """`pieces[k]` stands before the k-th content that is written, and the last piece after all of them."""

    pieces: tuple[str, ...]
    slots: tuple[int, ...]
    """Which message's content the template writes, in the order of the text."""
    strips: tuple[str, ...]
    """Method of str that each content goes through: '', strip, lstrip or rstrip."""
    spans: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    """Begin and end of what is learned, each as piece and byte in it."""
    strings: tuple[str, ...]
    edges: str

    def refuses(self, columns: Sequence[Sequence[str]]) -> list[int]:
        """Rows for which the template might do something else; `columns[m]` are the contents of message m."""
        rows: set[int] = set()
        for column in columns:
            rows.update(i for i, blank in enumerate(map(str.isspace, column)) if blank)
            if "" in column:
                rows.update(i for i, content in enumerate(column) if not content)
            together = "\0".join(column)
            for string in self.strings:
                if string in together:
                    rows.update(i for i, content in enumerate(column) if string in content)
            if self.edges:
                rows.update(i for i, c in enumerate(column) if c and (c[0] in self.edges or c[-1] in self.edges))
        return sorted(rows)

    def fill(self, columns: Sequence[Sequence[str]]) -> Filled:
        """Raises UnicodeEncodeError for a lone surrogate."""
        written = []
        for slot, strip in zip(self.slots, self.strips, strict=True):
            column = columns[slot]
            written.append([getattr(str, strip)(content) for content in column] if strip else column)
        parts: list[Any] = [repeat(self.pieces[0])]
        for column, piece in zip(written, self.pieces[1:], strict=True):
            parts += [column, repeat(piece)]
        texts = list(map("".join, zip(*parts, strict=False))) if written else [self.pieces[0]] * len(columns[0])
        # (rows, pieces): where each piece begins
        places = np.zeros((len(texts), len(self.pieces)), np.int64)
        for k, column in enumerate(written):
            places[:, k + 1] = places[:, k] + len(self.pieces[k].encode()) + utf8_lengths(column)
        sizes = places[:, -1] + len(self.pieces[-1].encode())
        begins = np.stack([places[:, piece] + byte for (piece, byte), _ in self.spans], axis=1)
        ends = np.stack([places[:, piece] + byte for _, (piece, byte) in self.spans], axis=1)
        return Filled(texts, sizes, begins, ends)


def make_plan(template: ChatTemplate, roles: Sequence[str], targets: str) -> Plan | str:
    """The plan for conversations of this shape, or why there is none. UserError where every such row is refused."""
    use = ContentUse()
    read_syntax(template.tree(), use)
    marks = [f"uVq{i:04d}Xwz" for i in range(len(roles))]
    template.write(_conversation(roles, [StandIn.of(mark, use) for mark in marks]))
    if use.unbounded:
        return f"the template uses {', '.join(sorted(use.unbounded))} of a content"
    plain = template.render(_conversation(roles, marks), targets=targets)
    found = list(re.finditer("|".join(marks), plain.text))
    slots = tuple(marks.index(match.group()) for match in found)
    borders = [0, *(place for match in found for place in match.span()), len(plain.text)]
    cuts = list(zip(borders[::2], borders[1::2], strict=True))
    spaced = template.write(_conversation(roles, [f"{_SPACE}{mark}{_SPACE}" for mark in marks]))
    pieces = tuple(plain.text[begin:end] for begin, end in cuts)
    strips = _strips(spaced, pieces, [marks[slot] for slot in slots])
    if strips is None:
        return "the template changes white space around contents in a way of its own"
    places = [tuple(_place(at, cuts, plain.text) for at in span) for span in plain.spans]
    if any(place is None for span in places for place in span):
        return "what is learned begins or ends within a content"
    plan = Plan(pieces, slots, strips, tuple(places), tuple(sorted(use.strings)), "".join(sorted(use.edges)))  # type: ignore[arg-type]
    for nasty in _NASTY:
        contents = [nasty.format(i=i) for i in range(len(roles))]
        if not plan.refuses([[c] for c in contents]):
            exact = template.render(_conversation(roles, contents), targets=targets)
            if difference(exact, plan.fill([[c] for c in contents]), 0):
                return f"the template changes contents such as {contents[0]!r}"
    return plan


def difference(exact: Rendered, filled: Filled, row: int) -> bool:
    """Whether a row filled in is not what the template wrote."""
    spans = [tuple(len(exact.text[:at].encode()) for at in span) for span in exact.spans]
    ours = list(zip(filled.begins[row].tolist(), filled.ends[row].tolist(), strict=True))
    return exact.text != filled.texts[row] or spans != ours


def _conversation(roles: Sequence[str], contents: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def _strips(spaced: str, pieces: Sequence[str], marks: Sequence[str]) -> tuple[str, ...] | None:
    """From the text written for contents with white space around them; None where that does not explain it."""
    strips, at = [], len(pieces[0])
    for mark, piece in zip(marks, pieces[1:], strict=True):
        left = spaced.startswith(_SPACE + mark, at)
        at += len(mark) + len(_SPACE) * left
        right = spaced.startswith(_SPACE + piece, at)
        at += len(piece) + len(_SPACE) * right
        strips.append(
            {(True, True): "", (False, False): "strip", (True, False): "rstrip", (False, True): "lstrip"}[left, right]
        )
    given = {
        "": lambda m: _SPACE + m + _SPACE,
        "strip": str,
        "rstrip": lambda m: _SPACE + m,
        "lstrip": lambda m: m + _SPACE,
    }
    explained = "".join(p + given[s](m) for p, s, m in zip(pieces, [*strips, "strip"], [*marks, ""], strict=True))
    return tuple(strips) if explained == spaced else None


def _place(at: int, cuts: Sequence[tuple[int, int]], text: str) -> tuple[int, int] | None:
    """Piece and byte in it of a character of the text."""
    for piece, (begin, end) in enumerate(cuts):
        if begin <= at <= end:
            return piece, len(text[begin:at].encode())
    return None


def utf8_lengths(column: Sequence[str]) -> np.ndarray:
    """(texts,) bytes of each."""
    lengths = np.fromiter(map(len, column), np.int64, len(column))
    for i, ascii_only in enumerate(map(str.isascii, column)):
        if not ascii_only:
            lengths[i] = len(column[i].encode())
    return lengths
