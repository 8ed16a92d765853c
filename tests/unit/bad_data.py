"""Bad data by the dozen (T15): tables only, read by test_bad_data.py."""

# ruff: noqa: E501 - one case a line
# fmt: off

import bz2
import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
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
  datasets: [{{name: own, source: "{source}", format: {format}}}]
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
    "number for role": ("messages", turns((1, "x"), ("assistant", "a")), "messages[0].role", "unknown role 1"),
    "no assistant": ("messages", turns(("user", "x")), "messages", "no assistant turn"),
    "no messages": ("messages", b'{"messages": []}', "messages", "no messages"),
    "empty answer": ("messages", turns(("user", "x"), ("assistant", "")), "messages[1].content", "empty answer"),
    "blank answer": ("messages", turns(("user", "x"), ("assistant", " \n\t")), "messages[1].content", "empty answer"),
    "one of two answers empty": ("messages", turns(("user", "x"), ("assistant", ""), ("user", "y"), ("assistant", "a")), "messages[1].content", "empty answer"),
    "empty question": ("messages", turns(("user", ""), ("assistant", "a")), "messages[0].content", "empty"),
    "blank question": ("messages", turns(("user", " \n"), ("assistant", "a")), "messages[0].content", "empty"),
    "empty prompt": ("prompt_completion", b'{"prompt": "", "completion": "a"}', "prompt", "empty"),
    "empty completion": ("prompt_completion", b'{"prompt": "a", "completion": " "}', "completion", "empty"),
    "empty text": ("text", b'{"text": ""}', "text", "empty"),
    "blank text": ("text", b'{"text": " \\n\\u3000"}', "text", "empty"),
    "not UTF-8": ("text", b'{"text": "x\xff"}', None, "not UTF-8 text: byte 0xff at column 12"),
    "UTF-16 in the middle": ("text", '{"text": "x"}'.encode("utf-16"), None, "not UTF-8 text: byte 0xff at column 1"),
    "NUL": ("text", b'{"text": "x\0"}', None, "not valid JSON: NUL byte at column 12"),
    "lone surrogate": ("text", b'{"text": "\\ud800"}', None, "not valid JSON: "),
    "not a number": ("text", b'{"text": NaN}', None, "not valid JSON: "),
    "single quotes": ("text", b"{'text': 'x'}", None, "not valid JSON: "),
    "a key twice": ("text", b'{"text": "a", "text": "b"}', "text", "given twice"),
    "nested too deeply": ("text", b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}", None, "not valid JSON: "),
    "tool arguments no JSON": ("messages", json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}).encode(), "messages[1].tool_calls.arguments", "not valid JSON: "),
}
