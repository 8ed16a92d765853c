"""Units of a source: together they are the whole, each has about the rows asked for, and a hash of its content."""

import json
import os
import tempfile
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlllm.data.manifest import Manifest, list_source, read_unit, read_units, unit_hash
from controlllm.errors import UserError


def _rows(unit, **options):
    return [row for batch in read_unit(unit, **options) for row in batch.rows()]


def _parquet(file: Path, groups: list[int], first: int = 0) -> list[dict]:
    rows = [{"n": first + i, "text": f"row {i} é" * (i % 5)} for i in range(sum(groups))]
    table = pa.Table.from_pylist(rows, schema=pa.schema({"n": pa.int64(), "text": pa.string()}))
    with pq.ParquetWriter(file, table.schema) as writer:
        for end, size in zip(accumulate(groups), groups, strict=True):
            writer.write_table(table.slice(end - size, size), row_group_size=max(size, 1))
    return rows


LINE = st.one_of(
    st.builds(lambda t: json.dumps({"t": t}, ensure_ascii=False), st.text(max_size=40)),
    st.sampled_from(["", "  ", "\t", "[1]", '{"broken": ', '{"t": "\u2028\x85"}']),
)


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(LINE, min_size=1, max_size=60), end=st.sampled_from(["\n", "\r\n"]), final=st.booleans(),
    unit_rows=st.integers(1, 40), limit=st.one_of(st.none(), st.integers(1, 50)),
)  # fmt: skip
def test_units_of_lines_are_the_file(lines, end, final, unit_rows, limit):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.jsonl")
        file.write_bytes((end.join(lines) + (end if final else "")).encode() or b"\n")
        expected = [(i, line) for i, line in enumerate(lines, start=1) if line.strip(" \t\r\n")][:limit]
        units = list_source(str(file), unit_rows=unit_rows, rows=limit).units
        batches = [batch for unit in units for batch in read_unit(unit, batch_rows=7)]
        good = [(i, json.loads(line)) for i, line in expected if line.startswith("{") and line.endswith("}")]
        assert [(n, r) for b in batches for n, r in zip(b.numbers.tolist(), b.rows(), strict=True)] == good
        assert {bad.row for b in batches for bad in b.bad} == {i for i, _ in expected} - {i for i, _ in good}
        assert all(a.end == b.start for a, b in pairwise(units))


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(st.lists(st.integers(0, 50), max_size=6), min_size=1, max_size=3),
    unit_rows=st.integers(1, 60), limit=st.one_of(st.none(), st.integers(1, 120)), batch_rows=st.integers(1, 40),
)  # fmt: skip
def test_units_of_row_groups_are_the_files(files, unit_rows, limit, batch_rows):
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row for i, groups in enumerate(files) for row in _parquet(Path(folder, f"{i}.parquet"), groups, i * 1000)
        ]
        if not rows:
            with pytest.raises(UserError, match="holds no rows"):
                list_source(f"{folder}/*.parquet", unit_rows=unit_rows)
            return
        manifest = list_source(f"{folder}/*.parquet", unit_rows=unit_rows, rows=limit)
        assert manifest.rows == len(rows[:limit])
        alone = [_rows(unit, batch_rows=batch_rows) for unit in manifest.units]
        assert [row for part in alone for row in part] == rows[:limit]
        assert [len(part) for part in alone] == [unit.rows for unit in manifest.units]
        together = [
            [row for b in batches for row in b.rows()]
            for _, batches in read_units(manifest.units, batch_rows=batch_rows)
        ]
        assert together == alone
        numbers = [n for unit in manifest.units for b in read_unit(unit) for n in b.numbers.tolist()]
        assert numbers == [row["n"] % 1000 + 1 for row in rows[:limit]]


def test_first_units_are_small_and_no_last_one_tiny(tmp_path):
    _parquet(tmp_path / "a.parquet", [100_000])
    _parquet(tmp_path / "b.parquet", [10_000] * 3)
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"n": i, "t": "x" * 50}) + "\n" for i in range(100_000, 130_000))
    )
    sizes = [unit.rows for unit in list_source(f"{tmp_path}/[ab].parquet", unit_rows=20_000).units]
    assert sizes == [5_000, 20_000, 20_000, 20_000, 20_000, 15_000, 20_000, 10_000]
    _parquet(tmp_path / "d.parquet", [2_000] * 25)
    joined = list_source(f"{tmp_path}/d.parquet", unit_rows=20_000).units
    assert [(unit.row_group, unit.row_groups, unit.rows) for unit in joined] == [
        (0, 2, 4_000), (2, 10, 20_000), (12, 13, 26_000),
    ]  # fmt: skip
    _parquet(tmp_path / "d.parquet", [2_000] * 20)
    merged = list_source(f"{tmp_path}/d.parquet", unit_rows=20_000).units
    assert [unit.rows for unit in merged] == [4_000, 20_000, 16_000]
    lines = [len(_rows(unit)) for unit in list_source(f"{tmp_path}/c.jsonl", unit_rows=8_000).units]
    assert lines == pytest.approx([2_000, 8_000, 8_000, 8_000, 4_000], abs=3)
    assert len(list_source(f"{tmp_path}/*", unit_rows=1 << 20).units) == 4


def test_rest_of_a_unit_that_is_not_used_is_skipped(tmp_path):
    rows = _parquet(tmp_path / "a.parquet", [100])
    units = list_source(f"{tmp_path}/a.parquet", unit_rows=10).units
    firsts = [next(batches).rows()[0] for _, batches in read_units(units, batch_rows=3)]
    assert firsts == [rows[unit.offset] for unit in units]


def test_bad_rows_are_cut_with_the_good_ones(tmp_path):
    offsets = b"".join(i.to_bytes(4, "little") for i in range(7))
    text = pa.StringArray.from_buffers(6, pa.py_buffer(offsets), pa.py_buffer(b"a\xffc\xff\xfff"))
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    units = list_source(f"{tmp_path}/a.parquet", unit_rows=2).units
    counts = [(sum(map(len, bs)), sum(len(b.bad) for b in bs)) for bs in (list(b) for _, b in read_units(units))]
    assert counts == [(sum(map(len, bs)), sum(len(b.bad) for b in bs)) for bs in (list(read_unit(u)) for u in units)]
    assert [sum(pair) for pair in zip(*counts, strict=True)] == [3, 3]


def test_plain_data_and_back(tmp_path):
    _parquet(tmp_path / "a.parquet", [30, 30])
    manifest = list_source(f"file://{tmp_path}/a.parquet", unit_rows=20)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.bytes == (tmp_path / "a.parquet").stat().st_size
    assert manifest.units[0].uri == str(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_hash_is_of_the_content(tmp_path, name):
    file = tmp_path / name
    if name == "a.parquet":
        _parquet(file, [100, 100])
    else:
        file.write_text('{"n": 1}\n' * 200)
    units = list_source(str(file), unit_rows=50).units
    before = [unit_hash(unit) for unit in units]
    if name == "a.parquet":
        assert len(set(before)) == len(units) == 4 + 1
    os.utime(file, (1, 1))
    assert [unit_hash(unit) for unit in units] == before
    moved = file.rename(tmp_path / f"other {name}")
    assert [unit_hash(unit) for unit in list_source(str(moved), unit_rows=50).units] == before
    content = moved.read_bytes()
    moved.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    again = [unit_hash(unit) for unit in list_source(str(moved), unit_rows=50).units]
    assert again[0] != before[0]
    assert name == "a.csv" or again[-1] == before[-1]


def test_a_changed_file_is_noticed(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1}\n' * 200)
    manifest = list_source(str(file), unit_rows=50)
    stamps = {f.uri: f.stamp for f in manifest.files}
    assert sum(len(list(batches)) for _, batches in read_units(manifest.units, stamps=stamps)) == len(manifest.units)
    file.write_text('{"n": 1}\n' * 199)
    with pytest.raises(
        UserError, match=r"a.jsonl: changed since it was listed \(1800 bytes then, 1791 now\); run again"
    ):
        _rows(manifest.units[0], stamp=manifest.files[0].stamp)
    with pytest.raises(UserError, match=r"ends at byte 1791, expected 1800"):
        [_rows(unit) for unit in manifest.units]


def test_columns_are_chosen_by_name(tmp_path):
    rows = _parquet(tmp_path / "a.parquet", [10])
    unit = list_source(f"{tmp_path}/a.parquet", unit_rows=50).units[0]
    assert _rows(unit, columns=["n", "absent"]) == [{"n": row["n"]} for row in rows]


def test_files_of_one_source_may_have_other_fields(tmp_path):
    _parquet(tmp_path / "a.parquet", [2])
    pq.write_table(pa.table({"other": ["x"]}), tmp_path / "b.parquet")
    units = list_source(f"{tmp_path}/*", unit_rows=50).units
    assert [sorted(row) for unit in units for row in _rows(unit)] == [["n", "text"], ["n", "text"], ["other"]]


def test_rows_are_counted_over_files(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.csv").write_text("n\n1\n2\n3\n")
    units = list_source(f"{tmp_path}/*.csv", unit_rows=50, rows=5).units
    assert [len(_rows(unit)) for unit in units] == [3, 2]
    assert list_source(f"{tmp_path}/*.csv", unit_rows=50).rows is None


def test_puzzles_are_one_unit():
    unit = list_source("reasoning-gym://gcd+chain_sum?max_terms=2", unit_rows=10, rows=20, seed=7).units[0]
    assert (unit.rows, unit.format) == (20, "reasoning-gym")
    assert _rows(unit, batch_rows=3) == _rows(unit)
    assert len(_rows(unit)) == 20
    other = list_source("reasoning-gym://gcd+chain_sum?max_terms=2", unit_rows=10, rows=20, seed=8).units[0]
    assert unit_hash(unit) != unit_hash(other)
    assert _rows(unit) != _rows(other)
