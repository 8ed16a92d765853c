"""The order of packed rows: complete, seeded, the same from any place and for any number of processes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlllm.data.order import DatasetOrder, Interleave, SortedOrder

COUNTS = st.lists(st.integers(0, 20), min_size=1, max_size=40).filter(any)


def order(counts, **changes):
    return DatasetOrder("a", len(counts), counts.__getitem__, **({"seed": 1} | changes))


@given(COUNTS, st.booleans(), st.sampled_from([1, 4]))
def test_every_epoch_shows_every_row_once(counts, shuffled, side_by_side):
    rows = order(counts, shuffled=shuffled, side_by_side=side_by_side)
    every = [(unit, row) for unit, count in enumerate(counts) for row in range(count)]
    for epoch in range(3):
        shown = [rows.place(epoch * len(every) + k) for k in range(len(every))]
        assert sorted(shown) == every


@given(COUNTS, st.integers(0, 10**6))
def test_any_place_is_found_without_walking_there(counts, k):
    assert order(counts).place(k) == order(counts).place(k)
    walked = order(counts)
    for place in range(0, min(k, 300)):
        walked.place(place)
    assert walked.place(k) == order(counts).place(k)


def test_the_first_rows_need_the_first_units_only():
    asked = []

    def count(unit):
        asked.append(unit)
        return 10

    rows = DatasetOrder("a", 100, count, seed=5)
    rows.place(0)
    assert set(asked) == {0}
    rows.place(39)
    assert set(asked) == {0, 1, 2, 3}
    assert rows.unit_order()[:4] == [0, 1, 2, 3]
    assert sorted(rows.unit_order()) == list(range(100))


def test_the_seed_and_the_name_change_the_order():
    counts = [30] * 6
    one = [order(counts).place(k) for k in range(180)]
    assert one != [order(counts, seed=2).place(k) for k in range(180)]
    other = DatasetOrder("b", 6, counts.__getitem__, seed=1)
    assert one != [other.place(k) for k in range(180)]


def test_unshuffled_is_the_order_of_the_source():
    rows = order([3, 2], shuffled=False)
    assert [rows.place(k) for k in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_padded_rows_of_similar_length_stay_together():
    rows = order([256], side_by_side=64)
    shown = [rows.place(k)[1] for k in range(256)]
    assert sorted(shown[:64]) == list(range(shown[0], shown[0] + 64))
    assert shown != list(range(256))


def test_no_row_is_an_error_and_no_endless_loop():
    with pytest.raises(ValueError, match="a: has no packed row"):
        order([0, 0]).place(0)


def test_sorted_goes_from_short_to_long_across_units():
    import numpy as np

    rows = SortedOrder([np.array([5.0, 1.0]), np.array([3.0])])
    assert [rows.place(k) for k in range(4)] == [(0, 1), (1, 0), (0, 0), (0, 1)]


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6))
def test_a_pass_over_a_mix_shows_each_row_as_often_as_it_should(counts):
    mix = Interleave(counts)
    shown = Counter(mix.place(position)[0] for position in range(sum(counts)))
    assert [shown[i] for i in range(len(counts))] == counts


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=6), st.integers(0, 9000))
def test_every_stretch_of_a_mix_holds_the_shares_and_each_row_follows_the_last(weights, start):
    mix = Interleave(weights)
    places = [mix.place(position) for position in range(start, start + 200)]
    for dataset, weight in enumerate(weights):
        rows = [k for d, k in places if d == dataset]
        assert rows == list(range(rows[0], rows[0] + len(rows))) if rows else True
        assert abs(len(rows) - 200 * weight / sum(weights)) <= 2 + len(weights) / 2
    assert Interleave(weights).place(start + 150) == places[150]


def test_any_number_of_processes_sees_the_same_rows():
    rows = order([7, 9, 4])
    alone = [rows.place(g) for g in range(60)]
    for world in (2, 3, 4):
        shared = {g: order([7, 9, 4]).place(g) for rank in range(world) for g in range(rank, 60, world)}
        assert [shared[g] for g in range(60)] == alone
