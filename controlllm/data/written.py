"""A block of documents as text with what is learned of each, and its tokens."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from controlllm.data.tokenize import Backend
from controlllm.data.types import TokenBatch


@dataclass(frozen=True)
class Written:
    """Lengths and places are in bytes of UTF-8."""

    index: np.ndarray  # (texts,) int64, which of the documents each one is
    texts: list[str]
    sizes: np.ndarray  # (texts,) int64
    span_of: np.ndarray  # (spans,) int64, index into `texts`
    begins: np.ndarray  # (spans,) int64, in its text
    ends: np.ndarray  # (spans,) int64
    plain: np.ndarray  # (texts,) bool, text and no conversation
    bad: list[tuple[int, str]]


@dataclass(frozen=True)
class Around:
    """What stands around plain text: the BOS of tokenizers that have one, and the EOS."""

    front: tuple[int, ...]
    end: int | None


def to_tokens(written: Written, backend: Backend, around: Around) -> TokenBatch:
    """A token is a target where it begins within a span. Where the ids' byte lengths do not add up to the text (a
    normalizer, added tokens that take white space along, ...), the tokenizer's own offsets are used."""
    texts = len(written.texts)
    if backend.byte_lengths is None:
        ids, offsets = np.zeros(0, np.uint32), np.zeros(texts + 1, np.int64)
        target, exact = np.zeros(0, bool), np.zeros(texts, bool)
    else:
        ids, offsets = backend.encode(written.texts)
        places = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(backend.byte_lengths[ids], out=places[1:])
        exact = _exact(written, backend, np.diff(places[offsets]))
        target = _targets(written, places, offsets)
    replaced = _by_offsets(written, backend, np.flatnonzero(~exact))
    return _assembled(written, ids, target, offsets, replaced, around)


def _exact(written: Written, backend: Backend, found: np.ndarray) -> np.ndarray:
    exact = found == written.sizes
    if form := backend.normal_form:
        exact &= np.array([t.isascii() or unicodedata.is_normalized(form, t) for t in written.texts], bool)  # type: ignore[arg-type]
    return exact


def _targets(written: Written, places: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(tokens,) bool; `places`: (tokens + 1,) where each token begins, counted through all texts."""
    base = places[offsets[:-1]][written.span_of]
    first, last = offsets[written.span_of], offsets[written.span_of + 1]
    begins = np.clip(np.searchsorted(places[:-1], base + written.begins), first, last)
    ends = np.clip(np.searchsorted(places[:-1], base + written.ends), first, last)
    steps = np.bincount(begins, minlength=len(places)) - np.bincount(ends, minlength=len(places))
    return np.cumsum(steps[:-1]) > 0


def _by_offsets(written: Written, backend: Backend, rows: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Ids and targets of some of the texts."""
    texts = [written.texts[row] for row in rows]
    if not texts:
        return {}
    ids, offsets, starts = backend.encode_with_starts(texts)
    made = {}
    order = np.argsort(written.span_of, kind="stable")
    bounds = np.searchsorted(written.span_of[order], np.stack([rows, rows + 1]))
    for i, (row, text) in enumerate(zip(rows.tolist(), texts, strict=True)):
        part = slice(offsets[i], offsets[i + 1])
        spans = order[bounds[0, i] : bounds[1, i]]
        at = _byte_places(text)[starts[part]][:, None]  # (tokens, 1)
        made[row] = ids[part], ((at >= written.begins[spans]) & (at < written.ends[spans])).any(axis=1)
    return made


def _byte_places(text: str) -> np.ndarray:
    """(characters + 1,) int64: the byte that each character begins with."""
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    places = np.zeros(len(code_points) + 1, np.int64)
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800).astype(np.int64) + (code_points >= 0x10000)
    np.cumsum(widths, out=places[1:])
    return places


def _assembled(
    written: Written,
    ids: np.ndarray,
    target: np.ndarray,
    offsets: np.ndarray,
    replaced: dict[int, tuple[np.ndarray, np.ndarray]],
    around: Around,
) -> TokenBatch:
    """With the replaced texts in their places, and what stands around plain text."""
    if not replaced and not written.plain.any():
        return TokenBatch(ids, target, offsets, written.index, written.bad)
    old = np.diff(offsets)
    counts = old.copy()
    for row, (own, _) in replaced.items():
        counts[row] = len(own)
    front = len(around.front) * written.plain
    new_offsets = np.zeros_like(offsets)
    np.cumsum(counts + front + written.plain, out=new_offsets[1:])
    first = new_offsets[:-1] + front
    new_ids, new_target = np.zeros(new_offsets[-1], np.uint32), np.ones(new_offsets[-1], bool)
    kept = np.ones(len(old), bool)
    kept[list(replaced)] = False
    kept = np.repeat(kept, old)
    places = (np.arange(len(ids)) + np.repeat(first - offsets[:-1], old))[kept]
    new_ids[places], new_target[places] = ids[kept], target[kept]
    for row, (own, own_target) in replaced.items():
        part = slice(first[row], first[row] + len(own))
        new_ids[part], new_target[part] = own, own_target
    for i, token in enumerate(around.front):
        new_ids[new_offsets[:-1][written.plain] + i] = token
    if around.end is not None:
        new_ids[new_offsets[1:][written.plain] - 1] = around.end
    return TokenBatch(new_ids, new_target, new_offsets, written.index, written.bad)


def joined(batches: Sequence[TokenBatch]) -> TokenBatch:
    """One batch after the other."""
    offsets = np.zeros(sum(map(len, batches)) + 1, np.int64)
    np.cumsum(np.concatenate([np.zeros(0, np.int64), *(np.diff(batch.offsets) for batch in batches)]), out=offsets[1:])
    return TokenBatch(
        ids=np.concatenate([np.zeros(0, np.uint32), *(batch.ids for batch in batches)]),
        target=np.concatenate([np.zeros(0, bool), *(batch.target for batch in batches)]),
        offsets=offsets,
        index=np.concatenate([np.zeros(0, np.int64), *(batch.index for batch in batches)]),
        bad=sorted(bad for batch in batches for bad in batch.bad),
    )
