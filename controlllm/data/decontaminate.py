"""Rows that hold a benchmark's items: runs of words that stand in both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from controlllm.data.keys import all_texts, mixed, texts_of
from controlllm.data.types import Document, Documents

_LETTER, _ALONE = 1, 2
# Characters that are looked at together; each takes some 100 bytes meanwhile.
_CHUNK = 1 << 17
_TABLE_BITS = 22
_LAST_CODE = 0x3FFFF  # beyond it there are neither letters nor ideographs
_KANA = ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F))
_IDEOGRAPHS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, _LAST_CODE))
_STEP = np.uint64(0x9E3779B97F4A7C15)
_BASE = 0xD6E8FEB86659FD93


class Contamination:
    """The runs of `words` words of a benchmark's texts, as hashes.

    Words are in lower case and without punctuation; a Chinese or Japanese character is a word. A text with fewer words
    counts as its whole self: it is found only where a message says just that, and not within a longer one.
    """

    def __init__(self, hashes: np.ndarray, words: int):
        self.words = words
        self.hashes = np.unique(hashes)
        # Most runs are none of the benchmark's: one look at a small table says so.
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        self._table[self._cell(self.hashes)] = True

    @classmethod
    def of(cls, texts: Iterable[str], *, words: int) -> Contamination:
        """From the texts of the benchmark's items; `words` is at least 1."""
        assert words >= 1, f"a run of {words} words"
        found = [_runs(chunk, words).hashes for chunk, _ in _chunks(list(texts))]
        return cls(np.concatenate([np.zeros(0, np.uint64), *found]), words)

    def rows(self, documents: Documents) -> np.ndarray:
        """(documents,) bool: which of them share a run with the benchmark."""
        texts, owners = all_texts(documents)
        contaminated = np.zeros(len(documents), bool)
        for chunk, first in _chunks(texts):
            runs = _runs(chunk, self.words)
            contaminated[owners[first + runs.text[self._among(runs.hashes)]]] = True
        return contaminated

    def hits(self, document: Document) -> str | None:
        """The first run of words that a document shares with the benchmark, in lower case."""
        for text in texts_of(document):
            runs = _runs([text], self.words)
            for hit in np.flatnonzero(self._among(runs.hashes))[:1]:
                return text.lower()[runs.start[hit] : runs.end[hit]]
        return None

    def save(self, path: Path) -> None:
        """As a `.npy` of uint64: the number of words, then the hashes."""
        with path.open("wb") as file:
            np.save(file, np.concatenate((np.asarray([self.words], np.uint64), self.hashes)))

    @classmethod
    def load(cls, path: Path) -> Contamination:
        """What `save` wrote."""
        stored = np.load(path)
        return cls(stored[1:], int(stored[0]))

    def _among(self, hashes: np.ndarray) -> np.ndarray:
        among = self._table[self._cell(hashes)]
        likely = hashes[among]
        place = np.minimum(np.searchsorted(self.hashes, likely), len(self.hashes) - 1)
        among[among] = self.hashes[place] == likely
        return among

    @staticmethod
    def _cell(hashes: np.ndarray) -> np.ndarray:
        return (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)


@dataclass(frozen=True)
class _Runs:
    """Runs of words: their hashes, which text each is in, and where in all texts together."""

    hashes: np.ndarray  # (runs,) uint64
    text: np.ndarray  # (runs,) int64
    start: np.ndarray  # (runs,) int64
    end: np.ndarray  # (runs,) int64


def _chunks(texts: list[str]) -> Iterator[tuple[list[str], int]]:
    """Texts of about `_CHUNK` characters together, and the index of the first of them."""
    first, size = 0, 0
    for index, text in enumerate(texts, start=1):
        size += len(text)
        if size >= _CHUNK or index == len(texts):
            yield texts[first:index], first
            first, size = index, 0


def _runs(texts: list[str], words: int) -> _Runs:
    """Every run of so many words, and the texts that have fewer."""
    lowered = [text.lower() for text in texts]
    codes = np.frombuffer("\n".join(lowered).encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds()[np.minimum(codes, _LAST_CODE)]
    start, end = _words(kinds)
    ends_of_texts = np.cumsum(np.fromiter(map(len, lowered), np.int64, len(lowered)) + 1)
    text = np.searchsorted(ends_of_texts, start, side="right")
    # A run begins at every word that has enough words behind it in its text.
    last_word = np.cumsum(np.bincount(text, minlength=len(texts)))  # (texts,) index behind the last word of each
    size = np.minimum(np.diff(last_word, prepend=0), words)[text]
    first = np.flatnonzero(np.arange(len(text)) + size <= last_word[text])
    behind = first + size[first]
    hashes = _hash_runs(_hash_words(codes, start, end), first, behind)
    return _Runs(hashes, text[first], start[first], end[behind - 1])


def _words(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(words,) where they begin, and where they end."""
    letter = np.concatenate(([False], kinds == _LETTER, [False]))
    alone = kinds == _ALONE
    start = np.flatnonzero(alone | (letter[1:-1] & ~letter[:-2]))
    return start, np.flatnonzero(alone | (letter[1:-1] & ~letter[2:])) + 1


def _hash_words(codes: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(words,) uint64."""
    lengths = end - start
    before = np.cumsum(lengths) - lengths
    place = np.arange(lengths.sum()) - np.repeat(before, lengths)
    letters = codes[np.repeat(start, lengths) + place].astype(np.uint64)
    sums = _sums(mixed(letters + _STEP * (place + 1).astype(np.uint64)))
    return mixed(sums[before + lengths] - sums[before])


def _hash_runs(words: np.ndarray, first: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """(runs,) uint64: as numbers whose digits are the words, so that a run's hash is a difference of two sums."""
    power = np.cumprod(np.full(len(words), _BASE, np.uint64))
    inverse = np.cumprod(np.full(len(words), pow(_BASE, -1, 1 << 64), np.uint64))
    sums = _sums(words * power)
    return mixed((sums[behind] - sums[first]) * inverse[first] + _STEP * (behind - first).astype(np.uint64))


def _sums(values: np.ndarray) -> np.ndarray:
    return np.concatenate((np.zeros(1, np.uint64), np.cumsum(values, dtype=np.uint64)))


@cache
def _kinds() -> np.ndarray:
    """(code points,) uint8: part of a word, a word by itself, or between words."""
    kinds = np.fromiter((chr(code).isalnum() for code in range(_LAST_CODE + 1)), np.uint8, _LAST_CODE + 1)
    for low, high in (*_KANA, *_IDEOGRAPHS):
        kinds[low : high + 1] *= _ALONE
    return kinds
