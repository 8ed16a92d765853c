"""Rows become documents: the same by columns as row by row, every row accounted for, every reason exact."""

from importlib.metadata import EntryPoint

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from controlllm.config import DatasetConfig
from controlllm.data.catalog import find_dataset
from controlllm.data.dataset import Dataset
from controlllm.data.documents import documents
from controlllm.data.keys import content_keys
from controlllm.data.plugins import load_plugins
from controlllm.data.steps import Step, build_steps
from controlllm.data.types import BadRow, RowBatch
from controlllm.errors import UserError

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
S = {"role": "system", "content": "S"}


def batch(rows, *, table=None):
    numbers = np.arange(1, len(rows) + 1)
    return RowBatch("f.jsonl", numbers, table=table) if table is not None else RowBatch("f.jsonl", numbers, dicts=rows)


def own(form, **fields):
    return find_dataset(DatasetConfig(name="own", source="f.jsonl", format=form, fields=fields))


def read(data, rows, steps=()):
    """From dictionaries and, where they fit into one, from a table: the same."""
    found = documents(data, batch(rows), steps)
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return found
    if [frozenset(row) for row in rows] == [frozenset(table.column_names)] * len(rows):
        same(found, documents(data, batch(rows, table=table), steps))
    return found


def same(a, b):
    assert list(a.documents) == list(b.documents)
    assert a.documents.numbers.tolist() == b.documents.numbers.tolist()
    assert a.bad == b.bad
    assert a.filtered == b.filtered
    assert content_keys(a.documents).tolist() == content_keys(b.documents).tolist()


@pytest.mark.parametrize(("form", "row", "document"), [
    ("text", {"text": "abc"}, "abc"),
    ("prompt_completion", {"prompt": "hi", "completion": "yes"}, [U, A]),
    ("prompt_completion", {"prompt": "hi", "completion": "yes", "system": "S"}, [S, U, A]),
    ("alpaca", {"instruction": "hi", "output": "yes"}, [U, A]),
    ("alpaca", {"instruction": "hi", "input": " ", "output": "yes", "system": ""}, [U, A]),
    ("alpaca", {"instruction": "hi", "input": "you", "output": "yes"}, [{"role": "user", "content": "hi\n\nyou"}, A]),
    ("messages", {"messages": [U, A], "id": 7}, [U, A]),
    ("messages", {"messages": [U, {**A, "weight": 1}]}, [U, A]),
    ("messages", {"messages": [U, {**A, "thinking": "hm"}]}, [U, {**A, "thinking": "hm"}]),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, A]}, [U, A]),
    ("messages", {"messages": [U, A], "tools": "[]"}, [U, A]),
    ("messages", {"messages": [U, A], "tools": '[{"name": "f"}]'}, {"messages": [U, A], "tools": [{"name": "f"}]}),
    ("messages", {"messages": [U, {"role": "assistant", "content": None,
                                   "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}]},
     [U, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, [U, A]),
    ("sharegpt", {"conversations": [{"from": "user", "value": "hi"}, {"from": "bing", "value": "yes"}], "system": "S"},
     [S, U, A]),
    ("sharegpt", {"conversations": [{"from": "observation", "value": "3"}, {"from": "chatgpt", "value": "yes"}]},
     [{"role": "tool", "content": "3"}, A]),
])  # fmt: skip
def test_forms(form, row, document):
    found = read(own(form), [row, row])
    assert found.bad == []
    assert list(found.documents) == [document, document]


@pytest.mark.parametrize(("form", "row", "field", "reason"), [
    ("text", {"txt": "a"}, "text", "missing; the row has: txt; did you mean 'txt'?"),
    ("text", {"text": None}, "text", "null"),
    ("text", {"text": 3}, "text", "must be text, found a number"),
    ("text", {"text": " \n"}, "text", "empty"),
    ("alpaca", {"instruction": "a", "output": ""}, "output", "empty"),
    ("alpaca", {"instruction": "a", "input": ["b"], "output": "c"}, "input", "must be text, found a list"),
    ("prompt_completion", {"prompt": None, "completion": "c"}, "prompt", "null"),
    ("messages", {"messages": "hi"}, "messages", "must be a list of messages, found text"),
    ("messages", {"messages": []}, "messages", "no messages"),
    ("messages", {"messages": [U]}, "messages", "no assistant turn"),
    ("messages", {"messages": [U, "yes"]}, "messages[1]", "must be an object with role and content, found text"),
    ("messages", {"messages": [{"role": "usr", "content": "a"}, A]}, "messages[0].role",
     "unknown role 'usr'; known: system, developer, user, assistant, tool"),
    ("messages", {"messages": [{"from": "human", "value": "a"}]}, "messages[0].role",
     "missing; the message has: from, value"),
    ("messages", {"messages": [U, A, U, {**A, "content": " "}]}, "messages[3].content", "empty answer"),
    ("messages", {"messages": [{**U, "content": None}, A]}, "messages[0].content", "null"),
    ("messages", {"messages": [{**U, "content": [{"type": "image_url"}]}, A]}, "messages[0].content",
     "only parts of text can be used, found image_url"),
    ("messages", {"messages": [U, A], "tools": "[{"}, "tools",
     "not valid JSON: Expecting property name enclosed in double quotes at column 3"),
    ("sharegpt", {"conversations": [{"from": "bot", "value": "a"}]}, "conversations[0].from",
     "unknown role 'bot'; known: human, user, gpt, assistant, chatgpt, bing, system, tool, function, observation"),
])  # fmt: skip
def test_reasons(form, row, field, reason):
    assert read(own(form), [row, row]).bad == [BadRow("f.jsonl", n, field, reason) for n in (1, 2)]


def test_fields_rename_and_must_be_there():
    data = own("alpaca", instruction="q", output="a", input="c")
    assert documents(data, batch([{"q": "hi", "c": "", "a": "yes"}])).documents[0] == [U, A]
    assert "field 'c': missing; the row has: q, a" in str(documents(data, batch([{"q": "hi", "a": "yes"}])).bad[0])
    with pytest.raises(UserError, match=r"fields: 'promt' is no field of format text; known: text"):
        own("text", promt="q")


texts = st.sampled_from(["", " ", "a", "two words", "三", "x\u2028", "\x1c", "\x00"]) | st.text(max_size=3)
odd = st.none() | texts
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "developer", "wrong"]) | st.none()
turn = st.builds(lambda r, c, n: {"role": r, "content": c, "name": n}, roles, odd, st.none() | st.just("x"))
talk = st.none() | st.lists(turn, max_size=4) | st.lists(turn, min_size=19, max_size=23)
good = st.just([U | {"name": None}, A | {"name": None}]) | st.just([A | {"name": None}] * 22)
columns = st.fixed_dictionaries(
    {
        "messages": talk | good,
        "instruction": odd,
        "input": odd,
        "output": odd,
        "system": odd,
        "tools": st.sampled_from([None, "", "[]"]),
    }
)
TYPES = pa.schema({
    "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "name": pa.string()})),
    **{name: pa.string() for name in ("instruction", "input", "output", "system", "tools")},
})  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(columns, max_size=8), st.data())
@example([{"messages": None, "instruction": None, "input": None, "output": None, "system": None, "tools": None}], None)
def test_columns_give_what_rows_give(rows, data):
    table = pa.Table.from_pylist(rows, schema=TYPES)
    names = {"messages": {}, "sharegpt": {"conversations": "messages", "from": "role", "value": "content"}}
    others = {
        "alpaca": {},
        "prompt_completion": {"prompt": "instruction", "completion": "output"},
        "text": {"text": "input"},
    }
    cut = data.draw(st.integers(0, len(rows))) if data else 0
    for form, fields in (names | others).items():
        a = documents(own(form, **fields), batch(rows[cut:]))
        b = documents(own(form, **fields), batch(rows[cut:], table=table.slice(cut)))
        same(a, b)
        assert len(rows) - cut == len(a.documents) + len(a.bad) + sum(a.filtered.values())


def test_chunks_large_types_and_other_types_make_no_difference():
    rows = [{"messages": [U, A]}, {"messages": [U, A, U, A]}, {"messages": [A]}]
    plain = pa.Table.from_pylist(rows)
    message = pa.struct({"content": pa.large_string(), "role": pa.large_string()})
    for table in (
        pa.concat_tables([plain, plain]),
        plain.cast(
            pa.schema({"messages": pa.large_list(pa.struct({"content": pa.large_string(), "role": pa.string()}))})
        ),
        pa.table({"messages": pa.array([r["messages"] for r in rows], pa.list_(message, -1))}),
        pa.table({"messages": pa.array([[U, A], [U, A]], pa.list_(message, 2))}),
        pa.table({"messages": pa.chunked_array([], plain.schema.field(0).type)}),
    ):
        expected = table.to_pylist()
        found = documents(own("messages"), batch(expected, table=table))
        assert list(found.documents) == [row["messages"] for row in expected]


def test_a_null_list_may_hide_messages():
    turns = pa.array([U, A, U, A])
    column = pa.ListArray.from_arrays(pa.array([0, 2, 4]), turns, mask=pa.array([False, True]))
    found = documents(own("messages"), batch([{}] * 2, table=pa.table({"messages": column})))
    assert list(found.documents) == [[U, A]]
    assert found.bad == [BadRow("f.jsonl", 2, "messages", "null")]


def test_bytes_that_are_no_text_are_one_bad_row():
    column = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    found = documents(own("text"), batch([{}] * 3, table=pa.table({"text": column})))
    assert list(found.documents) == ["good", "fine"]
    assert found.bad == [BadRow("f.jsonl", 2, "text", "not UTF-8 text at byte 0")]


def test_a_function_drops_rows_and_names_the_field_it_trips_over():
    def convert(row):
        return None if row["q"] == "drop" else [{"role": "user", "content": row["q"].strip()}, A]

    data = Dataset("own", "x", function=convert)
    rows = [{"q": "hi"}, {"q": "drop"}, {"q": None}, {"q": 3}, {"Q": "hi"}]
    found = documents(data, batch(rows))
    assert (list(found.documents), found.filtered) == ([[U, A]], {"dataset": 1})
    assert [(bad.row, bad.field, bad.reason) for bad in found.bad] == [
        (3, "q", "null"),
        (4, "q", "AttributeError: 'int' object has no attribute 'strip' (found a number)"),
        (5, "q", "missing; the row has: Q"),
    ]


@pytest.mark.parametrize(("made", "reason"), [
    (3, "a document is text, messages or an object with messages and tools, found a number"),
    ([U], "field 'messages': no assistant turn"),
    ("", "field 'text': empty"),
    ([], "field 'messages': no messages"),
])  # fmt: skip
def test_what_a_function_makes_is_checked(made, reason):
    found = documents(Dataset("own", "x", function=lambda row: made), batch([{"q": 1}]))
    assert str(found.bad[0]) == f"f.jsonl:1: {reason}"


def test_every_row_is_accounted_for():
    rows = [{"text": t} for t in ("abc", None, "a", "bad", "long" * 9, "")]
    steps = [*build_steps([{"length": {"min_chars": 2}}, {"regex": {"drop": "lo"}}], where="p"), Step("odd", {}, trip)]
    found = documents(own("text"), batch(rows), steps)
    assert list(found.documents) == ["abc"]
    assert found.filtered == {"length": 1, "regex": 1}
    assert [(bad.row, bad.reason) for bad in found.bad] == [
        (2, "null"), (4, "step odd: ValueError: cannot"), (6, "empty"),
    ]  # fmt: skip


def trip(document):
    if document == "bad":
        raise ValueError("cannot")
    return document


@pytest.mark.parametrize("group", ["controlllm.datasets", "controlllm.steps"])
def test_a_package_whose_plugin_cannot_be_imported_is_named(group, monkeypatch):
    point = EntryPoint("theirs", "no_such_module:name", group)
    monkeypatch.setattr("controlllm.data.plugins.entry_points", lambda group: [point])
    with pytest.raises(UserError, match=rf"'theirs' \(no_such_module:name\) under {group}, which cannot be imported"):
        load_plugins(group)
