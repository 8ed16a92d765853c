"""Bad data by the dozen (T15): tables only, read by test_bad_data.py."""

# ruff: noqa: E501 - one case a line
# fmt: off

import bz2
import gzip
import io
import json
import pickle
from typing import Any

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq

RECIPE = """\
name: bad
output: runs
model: {{name: {model}}}
pack: {{context_length: 256}}
mix:
  decontaminate: none
  datasets: [{{name: own, source: {source}, format: {format}}}]
benchmark: {{new: [puzzles], old: [], items: 1}}
smoke: null
"""


def chat(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"it is {number}"}]}


def text(number: int) -> dict[str, Any]:
    return {"text": f"the text {number}"}


def pair(number: int) -> dict[str, Any]:
    return {"prompt": f"say {number}", "completion": f"it is {number}"}


ROWS = {"messages": chat, "text": text, "prompt_completion": pair}


def lines(count: int, format: str = "messages") -> bytes:
    return b"".join(json.dumps(ROWS[format](number)).encode() + b"\n" for number in range(count))


def turns(*said: tuple[Any, Any]) -> bytes:
    """A row of messages."""
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in said]}).encode()


# name: (format of the dataset, the line, the field that is named, the reason)
BAD_LINES: dict[str, tuple[str, bytes, str | None, str]] = {
    "truncated": ("messages", b'{"messages": [{"role": "user", "con', None, "not valid JSON: "),
    "no JSON": ("messages", b"hello", None, "not valid JSON: "),
    "two rows in a line": ("text", b'{"text": "a"}{"text": "b"}', None, "not valid JSON: "),
    "array": ("messages", b'[{"role": "user", "content": "x"}]', None, "a row is an object of fields, found list"),
    "a number": ("text", b"5", None, "a row is an object of fields, found int"),
    "null row": ("text", b"null", None, "a row is an object of fields, found NoneType"),
    "empty object": ("text", b"{}", "text", "missing; the row has: nothing"),
    "missing field": ("messages", b'{"message": []}', "messages", "missing; the row has: message; did you mean 'message'?"),
    "missing of a pair": ("prompt_completion", b'{"prompt": "x"}', "completion", "missing; the row has: prompt"),
    "null": ("messages", b'{"messages": null}', "messages", "null"),
    "null text": ("text", b'{"text": null}', "text", "null"),
    "null content": ("messages", turns(("user", "x"), ("assistant", None)), "messages[1].content", "null"),
    "number for text": ("text", b'{"text": 5}', "text", "must be text, found a number"),
    "flag for text": ("text", b'{"text": true}', "text", "must be text, found true"),
    "list for text": ("text", b'{"text": ["a"]}', "text", "must be text, found a list"),
    "object for text": ("text", b'{"text": {"a": 1}}', "text", "must be text, found an object"),
    "text for messages": ("messages", b'{"messages": "hi"}', "messages", "must be a list of messages, found text"),
    "text for a message": ("messages", b'{"messages": ["hi"]}', "messages[0]", "must be an object with role and content, found text"),
    "number for content": ("messages", turns(("user", "x"), ("assistant", 5)), "messages[1].content", "must be text, found a number"),
    "picture in content": ("messages", turns(("user", [{"type": "image_url"}]), ("assistant", "a")), "messages[0].content", "only parts of text can be used, found image_url"),
    "bad role": ("messages", turns(("usr", "x"), ("assistant", "a")), "messages[0].role", "unknown role 'usr'; known: system, "),
    "no role": ("messages", b'{"messages": [{"content": "x"}]}', "messages[0].role", "missing; the message has: content"),
    "no assistant": ("messages", turns(("user", "x")), "messages", "no assistant turn"),
    "no messages": ("messages", b'{"messages": []}', "messages", "no messages"),
    "empty answer": ("messages", turns(("user", "x"), ("assistant", "")), "messages[1].content", "empty answer"),
    "blank answer": ("messages", turns(("user", "x"), ("assistant", " \n\t")), "messages[1].content", "empty answer"),
    "one of two answers empty": ("messages", turns(("user", "x"), ("assistant", ""), ("user", "y"), ("assistant", "a")), "messages[1].content", "empty answer"),
    "empty completion": ("prompt_completion", b'{"prompt": "a", "completion": " "}', "completion", "empty"),
    "empty text": ("text", b'{"text": ""}', "text", "empty"),
    "blank text": ("text", b'{"text": " \\n\\u3000"}', "text", "empty"),
    "not UTF-8": ("text", b'{"text": "x\xff"}', None, "not UTF-8 text: byte 0xff at column 12"),
    "NUL": ("text", b'{"text": "x\0"}', None, "not valid JSON: NUL byte at column 12"),
    "lone surrogate": ("text", b'{"text": "\\ud800"}', None, "not valid JSON: "),
    "not a number": ("text", b'{"text": NaN}', None, "not valid JSON: "),
    "single quotes": ("text", b"{'text': 'x'}", None, "not valid JSON: "),
    "nested too deeply": ("text", b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}", None, "not valid JSON: "),
    "tool arguments no JSON": ("messages", json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}).encode(), "messages[1].tool_calls.arguments", "not valid JSON: "),
}


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content))


def parquet(table: dict[str, list[Any]], **options: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(table), stream, **options)
    return stream.getvalue()


def avro(rows: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    fields = [{"name": name, "type": "string"} for name in rows[0]]
    fastavro.writer(stream, {"type": "record", "name": "r", "fields": fields}, rows, sync_interval=200)
    return stream.getvalue()


def arrow(table: dict[str, list[Any]]) -> bytes:
    stream = io.BytesIO()
    made = pa.table(table)
    with pa.ipc.new_file(stream, made.schema) as writer:
        writer.write_table(made, max_chunksize=10)
    return stream.getvalue()


def flipped(content: bytes, at: int, count: int = 16) -> bytes:
    at = at % len(content)
    return content[:at] + bytes(255 - byte for byte in content[at : at + count]) + content[at + count :]


TEXTS = [f"the text {number}" for number in range(60)]
PARQUET, AVRO, ARROW = parquet({"text": TEXTS}), avro([{"text": text} for text in TEXTS]), arrow({"text": TEXTS})
CSV = b"text\n" + b"".join(f"text {number}\n".encode() for number in range(5))
DATA = {"text": lines(5, "text"), "messages": lines(5)}
LONG = json.dumps({"text": "word " * 200}).encode() + b"\n"

GOOD = {
    "jsonl": DATA["text"], "jsonl.gz": gzip.compress(DATA["text"]), "jsonl.zst": zstd(DATA["text"]),
    "jsonl.bz2": bz2.compress(DATA["text"]), "json": json.dumps([text(1)]).encode(), "csv": CSV, "txt": b"text", "yaml": b"text: a",
    "parquet": PARQUET, "avro": AVRO, "arrow": ARROW,
}

# name: (files of texts, what is said ... in this order); all of them are the source, and are repaired by those in GOOD
DAMAGED: dict[str, tuple[dict[str, bytes], str]] = {
    "cut in the last line": ({"a.jsonl": DATA["text"][:-8]}, "a.jsonl:5: not valid JSON: ... 1 of 5 rows cannot be used; pack.max_bad_rows"),
    "gzip named jsonl": ({"a.jsonl": gzip.compress(DATA["text"])}, "a.jsonl: is gzip-compressed: name it .jsonl.gz"),
    "zstd named jsonl": ({"a.jsonl": zstd(DATA["text"])}, "a.jsonl: is zstd-compressed: name it .jsonl.zst"),
    "jsonl named gz": ({"a.jsonl.gz": DATA["text"]}, "a.jsonl.gz: damaged gzip file, or none: it does not begin like one"),
    "zstd cut": ({"a.jsonl.zst": zstd(lines(900, "text"))[:-40]}, "a.jsonl.zst: damaged zstd file"),
    "gzip cut": ({"a.jsonl.gz": gzip.compress(lines(900, "text"))[:-40]}, "a.jsonl.gz: damaged gzip file"),
    "bzip2 cut": ({"a.jsonl.bz2": bz2.compress(lines(900, "text"))[:-40]}, "a.jsonl.bz2: damaged bz2 file"),
    "parquet named jsonl": ({"a.jsonl": PARQUET}, "a.jsonl: is parquet and not jsonl: name it .parquet"),
    "jsonl named parquet": ({"a.parquet": DATA["text"]}, "a.parquet: damaged Parquet file"),
    "pickle named jsonl": ({"a.jsonl": pickle.dumps([{"text": "a"}])}, "a.jsonl: is a pickle"),
    "zip named jsonl": ({"a.jsonl": b"PK\x03\x04" + bytes(99)}, "a.jsonl: is a zip archive, and not jsonl"),
    "PDF named txt": ({"a.txt": b"%PDF-1.7\n" + bytes(range(256))}, "a.txt: is a PDF, and not txt"),
    "HTML named jsonl": ({"a.jsonl": b"<!DOCTYPE html>\n<html></html>\n"}, "a.jsonl: is an HTML page, and not jsonl"),
    "LFS pointer": ({"a.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"}, "a.jsonl: is a pointer of Git LFS ... git lfs pull"),
    "a JSON document named jsonl": ({"a.jsonl": json.dumps([text(1), text(2)], indent=1).encode()}, "a.jsonl: is one JSON document over several lines: name it .json"),
    "UTF-16": ({"a.jsonl": DATA["text"].decode().encode("utf-16")}, "a.jsonl: is UTF-16 text; convert it to UTF-8"),
    "nothing but NUL": ({"a.jsonl": bytes(4096)}, "a.jsonl:1: not valid JSON: NUL byte at column 1"),
    "LFS pointer named parquet": ({"a.parquet": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"}, "a.parquet: is a pointer of Git LFS"),
    "in a name of two lines": ({"a\nb.jsonl": DATA["text"] + b"{}\n"}, "a b.jsonl:6: field 'text': missing"),
    "text with a NUL": ({"a.txt": b"a\0b"}, "a.txt:1: field 'text': NUL byte at column 2"),
    "empty": ({"a.jsonl": b""}, "mix.datasets.0.source ... a.jsonl: the file is empty"),
    "one of two empty": ({"a.jsonl": DATA["text"], "b.jsonl": b""}, "b.jsonl: the file is empty"),
    "blank lines only": ({"a.jsonl": b"\n \n\t\r\n\n"}, "no row"),
    "a BOM only": ({"a.jsonl": b"\xef\xbb\xbf"}, "no row"),
    "a header only": ({"a.csv": b"text\n"}, "no row"),
    "parquet without rows": ({"a.parquet": parquet({"text": pa.array([], pa.string())})}, "a.parquet: holds no rows"),  # type: ignore[dict-item]
    "an empty list": ({"a.json": b"[]"}, "no row"),
    "json cut": ({"a.json": b'[{"text": "a"},\n{"te'}, "a.json:2: not valid JSON"),
    "json nested too deeply": ({"a.json": b"[" * 9000 + b"]" * 9000}, "a.json:1: not valid JSON"),
    "footer": ({"a.parquet": PARQUET[:-20] + bytes(20)}, "a.parquet: damaged Parquet file"),
    "footer's length": ({"a.parquet": PARQUET[:-8] + b"\xff\xff\xff\x7f" + PARQUET[-4:]}, "a.parquet: damaged Parquet file"),
    "footer's inside": ({"a.parquet": flipped(PARQUET, -60, 8)}, "a.parquet: damaged Parquet file"),
    "cut in the footer": ({"a.parquet": PARQUET[:-9]}, "a.parquet: damaged Parquet file"),
    "page": ({"a.parquet": flipped(PARQUET, 40)}, "a.parquet: damaged Parquet file: row group 0"),
    "page of the second file": ({"a.parquet": PARQUET, "b.parquet": flipped(PARQUET, 40)}, "b.parquet: damaged Parquet file: row group 0"),
    "YAML without such a day": ({"a.yaml": b"text: a\nd: 2024-02-30"}, "a.yaml: not valid YAML: day is out of range"),
    "YAML nested too deeply": ({"a.yaml": b"[" * 9000}, "a.yaml: not valid YAML"),
    "a field missing in the second file": ({"a.parquet": PARQUET, "b.parquet": parquet({"content": TEXTS})}, "b.parquet:1: field 'text': missing; the row has: content"),
    "another type in the second file": ({"a.parquet": PARQUET, "b.parquet": parquet({"text": list(range(60))})}, "b.parquet:1: field 'text': must be text, found a number"),
    "bytes in a column": ({"a.parquet": parquet({"text": [b"a", b"b"]})}, "a.parquet:1: field 'text': must be text, found bytes"),
    "a null in a column": ({"a.parquet": parquet({"text": ["a", None, "b"]})}, "a.parquet:2: field 'text': null"),
    "a struct for text": ({"a.parquet": parquet({"text": [{"a": 1}]})}, "a.parquet:1: field 'text': must be text, found an object"),
    "sync marker": ({"a.avro": flipped(AVRO, -16)}, "a.avro: damaged Avro file after row"),
    "Avro cut": ({"a.avro": AVRO[:-300]}, "a.avro: damaged Avro file after row"),
    "Avro header": ({"a.avro": AVRO[:30]}, "a.avro: damaged Avro file after row 0"),
    "arrow cut": ({"a.arrow": ARROW[:-200]}, "a.arrow: damaged Arrow file"),
    "ragged": ({"a.csv": b"text,n\na,1\nb,2,3\n"}, "a.csv:3: found 3 fields, the header has 2"),
    "ragged after a value of two lines": ({"a.csv": b'text,n\n"a\nb",1\nc\n'}, "a.csv:4: found 1 fields, the header has 2"),
    "open quote": ({"a.csv": CSV + b'"open\n'}, "a.csv:7: not valid CSV"),
    "header names a column twice": ({"a.csv": b"text,text\na,b\n"}, "a.csv:1: the header names the column 'text' twice"),
    "header lacks the field": ({"a.csv": b"content\na\n"}, "a.csv:2: field 'text': missing; the row has: content"),
    "csv not UTF-8": ({"a.csv": b"text\nx\xff\n"}, "a.csv:2: field 'text': not UTF-8 text"),
    "csv with a NUL": ({"a.csv": b"text\nx\0y\n"}, "a.csv:2: field 'text': holds a NUL byte"),
    "YAML tag": ({"a.yaml": b"text: !!python/object/apply:os.system [id]"}, "a.yaml: not valid YAML: could not determine a constructor for the tag"),
    "text not UTF-8": ({"a.txt": b"x\xff"}, "a.txt:1: field 'text': not UTF-8 text: byte 0xff"),
    "blank text file": ({"a.txt": b" \n"}, "a.txt:1: field 'text': empty"),
    "longer than the context": ({"a.jsonl": DATA["text"] + LONG}, "mix.datasets.0: ... a.jsonl:6: 1001 tokens do not fit into pack.context_length 256"),
}

# name: (format, its good files, source, changes to the recipe, what is said ... in this order)
WRONG: dict[str, tuple[str, dict[str, bytes], str, tuple[str, ...], str]] = {
    "pickle": ("text", {"a.pkl": pickle.dumps([{"text": "a"}])}, "a.pkl", (), "a.pkl: format not known by its name; known: .jsonl"),
    "all rows filtered": ("text", {"a.jsonl": DATA["text"]}, "a.jsonl", ("mix.datasets.0.preprocess=[{length: {min_chars: 999}}]",), "mix.datasets.0 (own): no row is left to train on (5 rows; left out: length: 5)"),
    "all rows held back": ("text", {"a.jsonl": lines(1, "text")}, "a.jsonl", ("pack.validation_fraction=0.999999",), "mix.datasets.0 (own): no row is left to train on (1 rows"),
    "all rows bad": ("text", {"a.jsonl": b"{}\n{}\n"}, "a.jsonl", ("pack.max_bad_rows=1",), "mix.datasets.0 (own): no row is left to train on (2 rows"),
    "a directory": ("text", {"d/a.jsonl": DATA["text"]}, "d", (), "mix.datasets.0.source: ... d: is a directory; name a file, or files as in ... d/*.jsonl"),
    "no such file": ("text", {"a.jsonl": DATA["text"]}, "b.jsonl", (), "mix.datasets.0.source: data/b.jsonl: no such file (looked in "),
    "nothing matches": ("text", {"a.jsonl": DATA["text"]}, "*.csv", (), "mix.datasets.0.source: data/*.csv: no such file (looked in "),
    "a file of another format matches": ("text", {"a.jsonl": DATA["text"], "b.md": b"x"}, "*", (), "b.md: format not known by its name"),
    "not a field of the format": ("text", {"a.jsonl": DATA["text"]}, "a.jsonl", ("mix.datasets.0.fields={texd: text}",), "'texd' is no field of format text; did you mean 'text'?"),
    "another format": ("sharegpt", {"a.jsonl": DATA["messages"]}, "a.jsonl", (), "a.jsonl:1: field 'conversations': missing; the row has: messages"),
    "template not UTF-8": ("messages", {"a.jsonl": DATA["messages"], "t.jinja": b"\xff"}, "a.jsonl", ("pack.chat_template=data/t.jinja",), "pack.chat_template: 'data/t.jinja' is not UTF-8 text (byte 1)"),
    "template empty": ("messages", {"a.jsonl": DATA["messages"], "t.jinja": b"\n"}, "a.jsonl", ("pack.chat_template=data/t.jinja",), "pack.chat_template: 'data/t.jinja' is empty"),
    "template broken": ("messages", {"a.jsonl": DATA["messages"], "t.jinja": b"{% for %}"}, "a.jsonl", ("pack.chat_template=data/t.jinja",), "the chat template is not valid: line 1: "),
    "no such day": ("messages", {"a.jsonl": DATA["messages"]}, "a.jsonl", ("pack.date=2024-02-30",), "pack.date: '2024-02-30' is no day of the calendar"),
    "unknown puzzle": ("text", {}, "reasoning-gym://gdc", (), "reasoning-gym://gdc: cannot be made: "),
    "unknown option of a puzzle": ("text", {}, "reasoning-gym://gcd?size_of=3", (), "reasoning-gym://gcd?size_of=3: cannot be made: ... size_of"),
    "password in an address": ("text", {}, "s3://AKIAKEY:HUSH@bucket/a.jsonl", (), "mix.datasets.0.source: s3://bucket: a password in an address ends in logs; put the keys into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    "password of HDFS": ("text", {}, "webhdfs://me:HUSH@host:9870/a.jsonl", (), "mix.datasets.0.source: webhdfs://host:9870: a password in an address ends in logs; put it into WEBHDFS_PASSWORD"),
    "password of another kind": ("text", {}, "ftp://me:HUSH@host/a.jsonl?sig=HUSH", (), "mix.datasets.0.source: ftp://host/a.jsonl: this kind of source is not known; known: hf://"),
    "token in a query": ("text", {}, "https://host/a.jsonl?X-Amz-Signature=HUSH&b=HUSH", (), "mix.datasets.0.source: https://host/a.jsonl: this kind of source is not known"),
}

# name: (format, its files, source, changes to the recipe, rows, documents)
WORKS: dict[str, tuple[str, dict[str, bytes], str, tuple[str, ...], int, int]] = {
    "one row": ("messages", {"a.jsonl": lines(1)}, "a.jsonl", (), 1, 1),
    "no line end at the end": ("text", {"a.jsonl": DATA["text"].rstrip()}, "a.jsonl", (), 5, 5),
    "BOM": ("text", {"a.jsonl": b"\xef\xbb\xbf" + DATA["text"]}, "a.jsonl", (), 5, 5),
    "CRLF": ("text", {"a.jsonl": DATA["text"].replace(b"\n", b"\r\n")}, "a.jsonl", (), 5, 5),
    "blank lines between": ("text", {"a.jsonl": DATA["text"].replace(b"\n", b"\n\n \n")}, "a.jsonl", (), 5, 5),
    "a value of two lines": ("text", {"a.csv": CSV + b'"two\nlines ""x"", y"\n'}, "a.csv", (), 6, 6),
    "csv with CRLF and BOM": ("text", {"a.csv": b"\xef\xbb\xbf" + CSV.replace(b"\n", b"\r\n")}, "a.csv", (), 5, 5),
    "formulas are text": ("text", {"a.csv": b"text\n=1+1\n@SUM(A1)\n"}, "a.csv", (), 2, 2),
    "the second of a key twice": ("text", {"a.jsonl": b'{"text": "", "text": "b"}'}, "a.jsonl", (), 1, 1),
    "empty question": ("messages", {"a.jsonl": turns(("user", ""), ("assistant", "a"))}, "a.jsonl", (), 1, 1),
    "fields that nobody asked for": ("text", {"a.jsonl": b'{"text": "a", "meta": {"b": [1, null]}}'}, "a.jsonl", (), 1, 1),
    "deep where nobody reads": ("text", {"a.jsonl": b'{"text": "a", "meta": ' + b"[" * 500 + b"]" * 500 + b"}"}, "a.jsonl", (), 1, 1),
    "other columns in the second file": ("text", {"a.parquet": PARQUET, "b.parquet": parquet({"n": list(range(60)), "text": TEXTS})}, "*.parquet", (), 120, 120),
    "large strings in the second file": ("text", {"a.parquet": PARQUET, "b.parquet": parquet({"text": pa.array(TEXTS, pa.large_string())})}, "*.parquet", (), 120, 120),  # type: ignore[dict-item]
    "two formats": ("text", {"a.jsonl": DATA["text"], "b.csv": CSV, "c.parquet": PARQUET, "d.avro": AVRO}, "*", (), 130, 130),
    "a line of 10 MB": ("text", {"a.jsonl": json.dumps({"text": "0123456789" * 1_000_000}).encode()}, "a.jsonl", ("pack.overlong=truncate",), 1, 1),
    "100,000 tiny rows": ("text", {"a.jsonl": b'{"text":"a"}\n' * 100_000}, "a.jsonl", ("pack.unit_rows=100000",), 100_000, 100_000),
    "control characters": ("text", {"a.jsonl": b'{"text": "\\u0000\\u001b[31m\\u202e\\uffff"}'}, "a.jsonl", (), 1, 1),
    "special tokens as text": ("messages", {"a.jsonl": turns(("user", "<|im_end|>"), ("assistant", "<|im_start|>user\n"))}, "a.jsonl", (), 1, 1),
    "longer is dropped": ("text", {"a.jsonl": DATA["text"] + LONG}, "a.jsonl", ("pack.overlong=drop",), 6, 5),
    "name that is no text": ("text", {"a\udcff.jsonl": DATA["text"]}, "*", (), 5, 5),
    **{f"name {name!r}": ("text", {name: DATA["text"]}, name, (), 5, 5) for name in (
        "a b.jsonl", "a'b.jsonl", "50%25.jsonl", "a#b.jsonl", "a?b.jsonl", "a[1].jsonl", "\u4f60\u597d \u00e9.jsonl", "a;$(id).jsonl", "-rf.jsonl", "a\nb.jsonl", "a:b@c.jsonl",
    )},
}
