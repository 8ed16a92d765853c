"""Documents into rows of a fixed length. Everything here is about lengths: no token is touched, but by `gather`."""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from controlllm.errors import UserError


@dataclass(frozen=True)
class Bins:
    """Bin b is one packed row: the documents `items[offsets[b]:offsets[b + 1]]`, in this order."""

    offsets: np.ndarray  # (bins + 1,) int64
    items: np.ndarray  # (documents,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Pieces:
    """Piece i is the tokens [start[i], start[i] + length[i]) of document[i]; all (pieces,) int64."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.document)


class Cut(NamedTuple):
    """Documents cut to size, and the number of documents to which it happened."""

    pieces: Pieces
    split: int
    dropped: int
    truncated: int
    lost_tokens: int
    """Of the dropped documents, and behind the end of the truncated ones."""


class Wrapped(NamedTuple):
    """The stream of all documents in rows; the bins' items are pieces, in their order."""

    pieces: Pieces
    bins: Bins


class OverlongError(UserError):
    """A document does not fit, and the recipe says that this is an error."""

    def __init__(self, document: int, tokens: int, capacity: int):
        super().__init__(
            f"{tokens} tokens do not fit into pack.context_length {capacity}; "
            "raise it, or set pack.overlong to split, truncate or drop"
        )
        self.document = document


def cut(lengths: np.ndarray, capacity: int, overlong: Literal["split", "drop", "truncate", "error"]) -> Cut:
    """Pieces of at most `capacity` tokens, in the documents' order; OverlongError names the first that is too long."""
    lengths = _checked(lengths)
    long = lengths > capacity
    count, tokens = int(long.sum()), int(lengths[long].sum())
    if count and overlong == "error":
        first = int(long.argmax())
        raise OverlongError(first, int(lengths[first]), capacity)
    if overlong == "split":
        each = -(-lengths // capacity)
        document = np.repeat(np.arange(len(lengths)), each)
        start = _ranges(np.zeros(len(lengths), np.int64), each) * capacity
        return Cut(Pieces(document, start, np.minimum(lengths[document] - start, capacity)), count, 0, 0, 0)
    if overlong == "drop":
        document = np.flatnonzero(~long)
        return Cut(Pieces(document, np.zeros_like(document), lengths[document]), 0, count, 0, tokens)
    document = np.arange(len(lengths))
    pieces = Pieces(document, np.zeros_like(document), np.minimum(lengths, capacity))
    return Cut(pieces, 0, 0, count, tokens - count * capacity)


def best_fit(lengths: np.ndarray, capacity: int) -> Bins:
    """Exact best-fit-decreasing: longest first, each into the fullest bin that still holds it, else into a new one.

    Equal lengths keep their order, and of bins that are equally full the one that was filled last is taken, so that
    the result is a function of the lengths alone. Bins stand in the order of their opening.
    """
    lengths = _checked(lengths, capacity)
    order = _stable_argsort(capacity - lengths)
    counts = np.bincount(lengths)
    distinct = np.flatnonzero(counts)[::-1]
    first, bins, each = _runs(distinct.tolist(), counts[distinct].tolist(), capacity)
    bin_of = np.repeat(_ranges(first, bins), np.repeat(each, bins))  # of each document in `order`
    return Bins(_offsets(np.bincount(bin_of)), order[_stable_argsort(bin_of)])


def best_fit_stream(lengths: np.ndarray, capacity: int, *, window: int = 1000, open_bins: int = 128) -> Bins:
    """Best fit in the documents' order: of `window` documents at a time the longest first, into `open_bins` bins.

    A bin is closed when it is full, or as the fullest when one more than `open_bins` would be open; of equally full
    ones the oldest. Bins stand in the order of their closing; at the end, fullest first.
    """
    lengths = _checked(lengths, capacity)
    bins: list[list[int]] = []
    closed: list[int] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for begin in range(0, len(lengths), window):
        part = lengths[begin : begin + window]
        order = _stable_argsort(capacity - part)
        for document, length in zip((order + begin).tolist(), part[order].tolist(), strict=True):
            place = bisect_left(room, (length, 0))
            if place < len(room):
                free, index = room.pop(place)
            else:
                if len(room) == open_bins:
                    closed.append(room.pop(0)[1])
                free, index = capacity, len(bins)
                bins.append([])
            bins[index].append(document)
            if free > length:
                insort(room, (free - length, index))
            else:
                closed.append(index)
    closed += [index for _, index in room]
    items = np.array([document for index in closed for document in bins[index]], np.int64)
    return Bins(_offsets(np.array([len(bins[index]) for index in closed], np.int64)), items)


def one_each(lengths: np.ndarray) -> Bins:
    """A bin for each document, shortest first, equal lengths in their order: neighbours need next to no padding."""
    lengths = _checked(lengths)
    return Bins(np.arange(len(lengths) + 1), _stable_argsort(lengths))


def wrap(lengths: np.ndarray, capacity: int) -> Wrapped:
    """The documents' tokens one after the other, cut every `capacity` tokens: only the last row has room left."""
    ends = _offsets(_checked(lengths))  # documents begin and end here in the stream
    rows = np.arange(0, ends[-1], capacity)
    edges = np.union1d(ends, rows)
    begin = edges[:-1]
    document = np.searchsorted(ends, begin, side="right") - 1
    bins = Bins(np.append(np.searchsorted(begin, rows), len(begin)), np.arange(len(begin)))
    return Wrapped(Pieces(document, begin - ends[document], np.diff(edges)), bins)


def gather(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The slices values[starts[i]:starts[i] + lengths[i]], one after the other; read-only. No two may overlap.

    Arrow's `take` copies them, as strings of bytes: four times as fast as a NumPy view of each, joined.
    """
    order = _stable_argsort(starts)
    edges = np.stack([starts, starts + lengths], axis=1)[order].reshape(-1)  # slice, gap, slice, gap, ...
    apart = np.diff(np.concatenate([[0], edges, [len(values)]])) >= 0
    assert apart.all(), "slices overlap or reach beyond the values"
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(0, 2 * len(order), 2)
    offsets = np.append(edges, edges[-1:]) * values.itemsize
    # From buffers, because pa.array imports pandas.
    buffers = [pa.py_buffer(array) for array in (offsets, np.ascontiguousarray(values), place)]
    parts = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(edges), [None, *buffers[:2]])
    taken = parts.take(pa.Array.from_buffers(pa.int64(), len(place), [None, buffers[2]]))
    return np.frombuffer(taken.buffers()[2], values.dtype, int(lengths.sum()))


def _runs(lengths: list[int], counts: list[int], capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where best fit puts counts[i] documents of lengths[i], descending: runs of (first bin, bins, documents in each).

    The fullest bin that holds a document is the fullest one that holds the next of the same length, too, as long as
    there is room; so a bin with room s takes s // length documents at once, and so do all bins with the same room.
    """
    rooms = _Rooms()
    runs: list[tuple[int, int, int]] = []
    opened = 0
    for length, left in zip(lengths, counts, strict=True):
        while left:
            room, first, bins = rooms.take(length) or (capacity, opened, -(-left // (capacity // length)))
            opened = max(opened, first + bins)
            each = room // length
            full, rest = divmod(left, each)
            if full >= bins:
                full, rest = bins, 0
            for begin, number, documents in ((first, full, each), (first + full, min(rest, 1), rest)):
                if number:
                    runs.append((begin, number, documents))
                    rooms.put(room - documents * length, begin, number)
            touched = full + min(rest, 1)
            rooms.put(room, first + touched, bins - touched)
            left -= full * each + rest
    first, bins, each = np.array(runs, np.int64).reshape(-1, 3).T
    return first, bins, each


class _Rooms:
    """Open bins by their free tokens, as ranges of bins."""

    def __init__(self) -> None:
        self.rooms: list[int] = []  # ascending, each once
        self.ranges: dict[int, list[tuple[int, int]]] = {}  # free tokens: (first bin, bins)

    def put(self, room: int, first: int, bins: int) -> None:
        if room and bins:
            if room not in self.ranges:
                insort(self.rooms, room)
                self.ranges[room] = []
            self.ranges[room].append((first, bins))

    def take(self, length: int) -> tuple[int, int, int] | None:
        """(room, first bin, bins) of the fullest bins that hold `length`."""
        place = bisect_left(self.rooms, length)
        if place == len(self.rooms):
            return None
        room = self.rooms[place]
        ranges = self.ranges[room]
        first, bins = ranges.pop()
        if not ranges:
            del self.rooms[place], self.ranges[room]
        return room, first, bins


def _checked(lengths: np.ndarray, capacity: int | None = None) -> np.ndarray:
    lengths = np.asarray(lengths, np.int64)
    if len(lengths):
        assert lengths.min() > 0, f"document {lengths.argmin()} has no token"
        assert capacity is None or lengths.max() <= capacity, f"document {lengths.argmax()} is longer than {capacity}"
    return lengths


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _ranges(first: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... sizes[0] of them, then those of first[1], and so on."""
    offsets = _offsets(sizes)
    return np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], sizes)


def _stable_argsort(values: np.ndarray) -> np.ndarray:
    """Of values in [0, 2**32), 16 bits at a time: NumPy's stable sort is a radix sort for these alone."""
    order = np.argsort(values.astype(np.uint16), kind="stable")
    high = values >> 16
    return order[np.argsort(high[order].astype(np.uint16), kind="stable")] if high.any() else order
