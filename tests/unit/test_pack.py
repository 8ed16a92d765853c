"""Packing: every token in exactly one place, no row above its capacity, and the bins that naive packers choose."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlllm.data.pack import Bins, OverlongError, best_fit, best_fit_stream, cut, gather, one_each, wrap
from controlllm.data.tighten import tighten
from controlllm.errors import UserError

MANY = settings(max_examples=2500, deadline=None)  # four tests: 10,000 cases


def _fitting(drawn):
    capacity, lengths = drawn
    return capacity, np.array([1 + length % capacity for length in lengths], np.int64)


lengths_of = st.lists(st.integers(1, 90), max_size=60)
fitting = st.tuples(st.integers(1, 60), lengths_of).map(_fitting)
"""A capacity and lengths that do not exceed it."""


def listed(bins: Bins) -> list[list[int]]:
    return [bins.items[a:b].tolist() for a, b in zip(bins.offsets[:-1], bins.offsets[1:], strict=True)]


def check(bins: Bins, lengths: np.ndarray, capacity: int) -> None:
    assert (bins.offsets[0], bins.offsets[-1]) == (0, len(lengths))
    assert (np.diff(bins.offsets) > 0).all()
    assert sorted(bins.items.tolist()) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= capacity for row in listed(bins))
    assert {bins.offsets.dtype, bins.items.dtype} == {np.dtype(np.int64)}
    assert len(bins) == len(bins.offsets) - 1


def naive_best_fit(lengths, capacity: int) -> list[int]:
    """What each bin holds, by trying every bin for each document."""
    filled: list[int] = []
    for length in sorted(lengths, reverse=True):
        if fits := [i for i, fill in enumerate(filled) if fill + length <= capacity]:
            filled[max(fits, key=lambda i: filled[i])] += length
        else:
            filled.append(length)
    return filled


def naive_stream(lengths, capacity: int, *, window: int, open_bins: int) -> list[list[int]]:
    opened: list[list[int]] = []
    closed: list[list[int]] = []

    def fill(row):
        return sum(lengths[i] for i in row)

    for begin in range(0, len(lengths), window):
        part = range(begin, min(begin + window, len(lengths)))
        for i in sorted(part, key=lambda i: -lengths[i]):
            if fits := [row for row in opened if fill(row) + lengths[i] <= capacity]:
                row = max(fits, key=fill)
            else:
                if len(opened) == open_bins:
                    closed.append(max(opened, key=fill))
                    opened.remove(closed[-1])
                opened.append(row := [])
            row.append(i)
            if fill(row) == capacity:
                closed.append(row)
                opened.remove(row)
    return closed + sorted(opened, key=lambda row: -fill(row))


@MANY
@given(fitting)
def test_best_fit_fills_as_the_naive_one(case):
    capacity, lengths = case
    bins = best_fit(lengths, capacity)
    check(bins, lengths, capacity)
    assert sorted(lengths[row].sum() for row in listed(bins)) == sorted(naive_best_fit(lengths.tolist(), capacity))
    order = [(-lengths[i], i) for i in range(len(lengths))]
    assert all(row == sorted(row, key=order.__getitem__) for row in listed(bins))
    first = [row[0] for row in listed(bins)]
    assert first == sorted(first, key=order.__getitem__)


@MANY
@given(fitting, st.integers(1, 20), st.integers(1, 5))
def test_stream_chooses_as_the_naive_one(case, window, open_bins):
    capacity, lengths = case
    bins = best_fit_stream(lengths, capacity, window=window, open_bins=open_bins)
    check(bins, lengths, capacity)
    assert listed(bins) == naive_stream(lengths.tolist(), capacity, window=window, open_bins=open_bins)


@MANY
@given(lengths_of, st.integers(1, 40))
def test_wrap_is_the_stream_in_rows(lengths, capacity):
    values, offsets = np.arange(sum(lengths), dtype=np.uint32), np.cumsum([0, *lengths])
    pieces, bins = wrap(np.array(lengths, np.int64), capacity)
    check(bins, pieces.length, capacity)
    assert bins.items.tolist() == list(range(len(pieces)))
    assert ((pieces.start >= 0) & (pieces.length > 0)).all()
    assert (pieces.start + pieces.length <= np.array(lengths, np.int64)[pieces.document]).all()
    assert gather(values, offsets[pieces.document] + pieces.start, pieces.length).tolist() == values.tolist()
    filled = [pieces.length[row].sum() for row in listed(bins)]
    assert filled[:-1] == [capacity] * (len(filled) - 1)


@MANY
@given(lengths_of, st.integers(1, 40), st.sampled_from(["split", "drop", "truncate"]))
def test_cut_keeps_or_counts_every_token(lengths, capacity, overlong):
    pieces, split, dropped, truncated, lost = cut(np.array(lengths, np.int64), capacity, overlong)
    places = [(d, t) for d, length in enumerate(lengths) for t in range(length)]
    kept = [
        (d, t)
        for d, start, length in zip(*(a.tolist() for a in (pieces.document, pieces.start, pieces.length)), strict=True)
        for t in range(start, start + length)
    ]
    wanted = {
        "split": places,
        "drop": [(d, t) for d, t in places if lengths[d] <= capacity],
        "truncate": [(d, t) for d, t in places if t < capacity],
    }[overlong]
    assert kept == wanted
    assert lost == len(places) - len(kept)
    long = sum(length > capacity for length in lengths)
    assert (split, dropped, truncated) == tuple(long * (overlong == name) for name in ("split", "drop", "truncate"))
    assert pieces.length.max(initial=0) <= capacity
    check(one_each(pieces.length), pieces.length, capacity)
    order = best_fit(pieces.length, capacity).items
    starts = np.cumsum([0, *lengths])[pieces.document] + pieces.start
    moved = gather(np.arange(sum(lengths), dtype=np.uint16), starts[order], pieces.length[order])
    wanted_tokens = [t for i in order for t in range(starts[i], starts[i] + pieces.length[i])]
    assert moved.tolist() == wanted_tokens


def test_too_long_is_an_error_that_says_which_and_what_to_do():
    assert len(cut(np.array([3, 4]), 4, "error").pieces) == 2
    with pytest.raises(UserError, match=r"^9 tokens do not fit into pack.context_length 4; raise it, or set") as caught:
        cut(np.array([3, 9, 12]), 4, "error")
    assert isinstance(caught.value, OverlongError)
    assert caught.value.document == 1


def test_one_each_has_like_lengths_side_by_side():
    assert listed(one_each(np.array([5, 2, 70_000, 2, 9]))) == [[1], [3], [0], [4], [2]]


@pytest.mark.parametrize(("lengths", "capacity", "fills"), [
    (range(1, 101), 100, [100] * 50 + [50]),
    ([7] * 10, 21, [21] * 3 + [7]),
    ([1] * 250, 100, [100] * 2 + [50]),
    ([60, 40, 41, 59, 50, 50], 100, [100] * 3),
    ([3, 5, 4], 8, [8, 4]),
])  # fmt: skip
def test_best_fit_by_hand(lengths, capacity, fills):
    lengths = np.array(lengths)
    bins = best_fit(lengths, capacity)
    check(bins, lengths, capacity)
    assert [lengths[row].sum() for row in listed(bins)] == fills


def test_lengths_and_bins_beyond_16_bits():
    small = np.random.default_rng(0).integers(1, 20_000, 30_000)
    lengths = np.concatenate([small, np.full(70_000, 200_000)])
    bins = best_fit(lengths, 200_000)
    check(bins, lengths, 200_000)
    assert len(bins) == 70_000 + np.ceil(small.sum() / 200_000)


def test_nothing_gives_nothing():
    none = np.array([], np.int64)
    packed = best_fit(none, 8), best_fit_stream(none, 8), one_each(none), wrap(none, 8).bins
    assert [len(bins) for bins in packed] == [0] * 4
    assert len(cut(none, 8, "split").pieces) == 0
    assert [gather(np.arange(n, dtype=np.uint16), none, none).tolist() for n in (0, 3)] == [[], []]


@pytest.mark.parametrize("dtype", [np.bool_, np.uint16, np.uint32])
def test_gather_keeps_order_and_type(dtype):
    values = np.arange(20)[::2].astype(dtype)  # not contiguous
    taken = gather(values, np.array([7, 0, 3]), np.array([3, 2, 1]))
    assert taken.dtype == dtype
    assert taken.tolist() == values[[7, 8, 9, 0, 1, 3]].tolist()


@pytest.mark.parametrize(("starts", "lengths"), [([0, 2], [3, 1]), ([8], [3]), ([-1], [1])])
def test_gather_takes_no_token_twice_or_from_elsewhere(starts, lengths):
    with pytest.raises(AssertionError):
        gather(np.arange(10), np.array(starts), np.array(lengths))


@pytest.mark.parametrize("wrong", [[3, 0], [9]])
def test_lengths_that_fit_no_bin_are_a_mistake_of_the_caller(wrong):
    with pytest.raises(AssertionError, match="document"):
        best_fit(np.array(wrong), 8)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=400), st.integers(60, 200))
def test_tightened_bins_hold_the_same_documents_in_no_more_bins(lengths, capacity):
    lengths = np.array(lengths, np.int64)
    fit = best_fit(lengths, capacity)
    tight = tighten(lengths, fit, capacity)
    assert sorted(tight.items.tolist()) == list(range(len(lengths)))
    assert all(lengths[tight.items[a:b]].sum() <= capacity for a, b in pairwise(tight.offsets))
    assert len(tight) <= len(fit)


def test_tightening_saves_rows_where_best_fit_runs_out_of_short_documents():
    lengths = np.random.default_rng(0).integers(100, 160, 20_000)
    fit = best_fit(lengths, 4096)
    fewest = -(-lengths.sum() // 4096)
    assert len(tighten(lengths, fit, 4096)) - fewest < (len(fit) - fewest) / 2
