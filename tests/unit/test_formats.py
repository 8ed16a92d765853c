"""The same rows in every format; what is broken is set aside with its place, or ends reading with one line."""

import bz2
import csv
import gzip
import json
from pathlib import Path

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from controlllm.data.manifest import list_source, read_unit
from controlllm.errors import UserError

ROWS = [
    {"question": f'q{i} "quoted",\nline 二 é \t tab', "answer": "  " if i % 7 else f"a{i}\r\n"} for i in range(1000)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
SCHEMA = {"type": "record", "name": "r", "fields": [{"name": n, "type": "string"} for n in ("question", "answer")]}


def _write(file: Path) -> None:
    name, table = file.name, pa.Table.from_pylist(ROWS)
    if name.endswith(".parquet"):
        pq.write_table(table, file, row_group_size=300)
    elif name == "stream.arrow":
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=170)
    elif name.endswith((".arrow", ".feather")):
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=170)
    elif name.endswith(".avro"):
        with file.open("wb") as stream:
            fastavro.writer(stream, SCHEMA, ROWS, codec="deflate", sync_interval=2000)
    elif name.endswith((".csv", ".tsv")):
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif name.endswith(".json"):
        file.write_text(json.dumps(ROWS, indent=1))
    else:
        codec = {"gz": gzip.compress, "bz2": bz2.compress, "zst": pa.Codec("zstd").compress}.get(name.split(".")[-1])
        file.write_bytes(bytes(codec(LINES)) if codec else LINES)


def _read(source: object, **options):
    batches = [batch for unit in list_source(str(source), unit_rows=300, **options).units for batch in read_unit(unit)]
    return [row for b in batches for row in b.rows()], [bad for b in batches for bad in b.bad], batches


@pytest.mark.parametrize("name", [
    "a.parquet", "a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.json", "a.csv", "a.tsv",
    "a.arrow", "stream.arrow", "a.feather", "a.avro",
])  # fmt: skip
def test_every_format_gives_the_same_rows(tmp_path, name):
    _write(tmp_path / name)
    rows, bad, batches = _read(tmp_path / name)
    assert rows == ROWS
    assert not bad
    assert sum(map(len, batches)) == 1000
    if not name.endswith(("csv", "tsv")):  # there the number is a line, and these rows have several
        assert [n for b in batches for n in b.numbers] == list(range(1, 1001))
    assert _read(tmp_path / name, rows=451)[0] == ROWS[:451]


def test_text_and_yaml_are_one_row(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfall\n\nof it")
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(ROWS[0], allow_unicode=True))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed", mtime=0))
    assert _read(tmp_path / "*")[0] == [{"text": "all\n\nof it"}, ROWS[0], {"text": "packed"}]


@pytest.mark.parametrize(("name", "content", "bad", "good"), [
    ("a.jsonl", b'{"a": 1}\n{"a": \n\n{"a": 2}', [(2, "not valid JSON")], 2),
    ("a.jsonl", b'[1]\n{"a": 1}\n"x"\n', [(1, "an object of fields, found list"), (3, "found str")], 1),
    ("a.jsonl", b'{"a": "x\xff"}\n{}\n', [(1, "not UTF-8 text: byte 0xff at column 9")], 1),
    ("a.jsonl", b'{"a": "\0"}\n{"a": "\\u0000"}\n', [(1, "NUL byte at column 8")], 1),
    ("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n \t\r\n{"a": 2}\r\n{"a": NaN}\r\n', [(4, "not valid JSON")], 2),
    ("a.jsonl", b'{"a": "\\ud800"}\n', [(1, "not valid JSON")], 0),
    ("a.jsonl.gz", gzip.compress(b'{}\n{"a"', mtime=0), [(2, "not valid JSON")], 1),
    ("a.json", b'[{"a": 1}, 2, {"a": 3}]', [(2, "found int")], 2),
    ("a.json", b'\xef\xbb\xbf{"a": 1}', [], 1),
    ("a.csv", b'a,b\n1\n1,2\n"x\ny",2\n1,2,3\n', [(2, "found 1 fields, the header has 2"), (6, "found 3")], 2),
    ("a.csv", b'a,b\n1,2\n\n3,\xff\n4,"open\n5,6\n', [(4, "not UTF-8"), (5, "not valid CSV")], 1),
    ("a.csv", b'a,b\n"1"x,2\n3,4\n', [(2, "not valid CSV")], 1),
    ("a.tsv", b'a\tb\n1,2\n', [(2, "found 1 fields")], 0),
    ("a.txt", b'x\xff', [(1, "not UTF-8 text: byte 0xff at column 2")], 0),
    ("a.yaml", b'[1, 2]', [(1, "a mapping of fields, found list")], 0),
])  # fmt: skip
def test_a_bad_row_is_set_aside(tmp_path, name, content, bad, good):
    (tmp_path / name).write_bytes(content)
    rows, found, _ = _read(tmp_path / name)
    assert len(rows) == good
    assert [row.row for row in found] == [number for number, _ in bad]
    for row, (_, says) in zip(found, bad, strict=True):
        assert says in row.reason
        assert str(row).startswith(f"{tmp_path / name}:{row.row}: ")


def test_text_that_is_not_utf8_in_a_column_is_a_bad_row(tmp_path):
    column = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    pq.write_table(pa.table({"n": [1, 2, 3], "text": column}), tmp_path / "a.parquet")
    rows, bad, _ = _read(tmp_path / "a.parquet")
    assert rows == [{"n": 1, "text": "a"}, {"n": 3, "text": "c"}]
    assert [(b.row, b.field) for b in bad] == [(2, "text")]


def _made(folder: Path, name: str) -> bytes:
    _write(folder / name)
    return (folder / name).read_bytes()


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes(255 - byte for byte in content[at : at + 40]) + content[at + 40 :]


@pytest.mark.parametrize(("made", "named", "damage", "says"), [
    ("a.parquet", "a.parquet", lambda c: c[:-50], "damaged Parquet file"),
    ("a.parquet", "a.parquet", lambda c: _flipped(c, 8), "damaged Parquet file: row group 0"),
    ("a.parquet", "a.jsonl", lambda c: c, "is parquet and not jsonl: name it .parquet"),
    ("a.jsonl.gz", "a.jsonl", lambda c: c, "is gzip-compressed: name it .jsonl.gz"),
    ("a.jsonl.zst", "a.jsonl.gz", lambda c: c, "damaged gzip file, or none"),
    ("a.jsonl.gz", "a.jsonl.gz", lambda c: c[:-500], "damaged gzip file"),
    ("a.jsonl.gz", "a.jsonl.gz", lambda c: _flipped(c, 1000), "damaged gzip file"),
    ("a.jsonl.zst", "a.jsonl.zst", lambda c: c[:-500], "damaged zstd file"),
    ("a.jsonl.bz2", "a.jsonl.bz2", lambda c: c[:-500], "damaged bz2 file"),
    ("a.avro", "a.avro", lambda c: c[:-700] + bytes(16) + c[-684:], "damaged Avro file after row"),
    ("a.avro", "a.avro", lambda c: c[:-300], "damaged Avro file after row"),
    ("a.arrow", "a.arrow", lambda c: c[:-500], "damaged Arrow file"),
    ("stream.arrow", "a.arrow", lambda c: c[:5000], "damaged Arrow file"),
    ("a.json", "a.json", lambda c: c[:-3], "a.json:4001: not valid JSON"),
    ("a.json", "a.json", lambda c: b"", "the file is empty"),
    ("a.jsonl", "a.jsonl", lambda c: c.decode().encode("utf-16"), "is UTF-16 text; convert it to UTF-8"),
    ("a.csv", "a.csv", lambda c: b"a,a\n1,2\n", "names the column 'a' twice"),
    ("a.jsonl", "a.xyz", lambda c: c, "format not known by its name; known: .jsonl, "),
    ("a.jsonl", "a.yaml", lambda c: b"a: [", "not valid YAML"),
])  # fmt: skip
def test_damage_is_one_line(tmp_path, made, named, damage, says):
    content = _made(tmp_path, made)
    (tmp_path / made).unlink()
    (tmp_path / named).write_bytes(damage(content))
    with pytest.raises(UserError) as error:
        _read(tmp_path / named)
    assert says in str(error.value)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_an_arrow_file_read_as_a_stream_is_the_same(tmp_path):
    """As where it is not on this machine."""
    from controlllm.data.formats import read_file

    for name in ("a.arrow", "stream.arrow"):
        _write(tmp_path / name)
        with (tmp_path / name).open("rb") as file:
            batches = list(read_file(file, "arrow", name=name, batch_rows=64))
        assert [row for b in batches for row in b.rows()] == ROWS
        assert [n for b in batches for n in b.numbers] == list(range(1, 1001))
