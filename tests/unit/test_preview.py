"""The preview: what it shows is what training will see, and nothing of the data gets out of its page."""

import io
import json
import re

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from controlllm import pipeline
from controlllm.cli import main
from controlllm.config import load_config
from controlllm.data.loader import Mix
from controlllm.data.shelf import Shelf
from controlllm.errors import UserError
from controlllm.preview import preview, print_preview, write_preview
from controlllm.progress import console

pytestmark = pytest.mark.usefixtures("store")
EVIL = "a<script>alert(1)</script></pre>&amp;\x1b[2J\0é[bold]x[/]"


def chat(number):
    asked = f"{number}: {EVIL if number % 5 == 0 else 'who' * (number % 7 + 1)}?"
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": f"it is {number}"}]}


@pytest.fixture
def own(tmp_path):
    """Overrides for a recipe on files of the test's own, in several shards."""
    for name in ("a", "b"):
        rows = [chat(number) for number in range(60 if name == "a" else 90)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda *names, **more: [
        "mix.datasets=["
        + ", ".join(
            f"{{name: {n}, source: {tmp_path}/{n}.jsonl, format: messages"
            + "".join(f", {key}: {value}" for key, value in more.items())
            + "}"
            for n in names
        )
        + "]",
        "pack.unit_rows=32",
        "pack.overlong=split",
        "benchmark.old=[chat]",
        "benchmark.items=2",
    ]


def shards(store):
    return {file.name: file.stat().st_mtime_ns for file in (store / "shards").glob("[0-9a-f]*")}


def in_training(config, store, tokenizer, count):
    """(dataset, tokens as text, learned text, source rows) of the first packed rows, out of a full prepare."""
    pipeline.run(config, until="prepare")
    (folder,) = [f for f in (store / "prepare").iterdir() if not f.name.startswith(".")]
    mix = Mix([Shelf.open(folder / d.name) for d in config.mix.datasets], config.mix, config.pack)
    for position in range(count):
        row = mix.row(position)
        name = config.mix.datasets[mix.place(position)[0]].name
        learned = tokenizer.decode(row["input_ids"][row["target"]])
        yield name, tokenizer.decode(row["input_ids"]), learned, row["rows"].tolist(), row["lengths"].tolist()


def as_shown(row):
    texts = [(piece.text, piece.kind) for document in row for piece in document.pieces]
    learned = "".join(text for text, kind in texts if kind.startswith("target"))
    rows = [int(document.source.rpartition(" ")[2]) for document in row]
    return row[0].dataset, "".join(t for t, _ in texts), learned, rows, [document.tokens for document in row]


def hidden(row):
    """Control characters are shown as pictures."""
    pictures = {0: "␀", 27: "␛"}
    return tuple(part.translate(pictures) if isinstance(part, str) else part for part in row)


@pytest.mark.parametrize(("names", "settings", "changes"), [
    ("a", {}, []),
    ("a", {}, ["mix.order=source"]),
    ("a", {}, ["pack.context_length=64"]),
    ("a", {}, ["pack.strategy=wrap", "pack.context_length=100"]),
    ("a", {}, ["pack.strategy=pad"]),
    ("ab", {"weight": 2}, []),
    ("ab", {}, ["pack.unit_rows=1000"]),
])  # fmt: skip
def test_the_first_rows_of_training_are_shown(recipe, store, own, tiny_base, names, settings, changes):
    config = load_config(recipe, *own(*names, **settings), *changes)
    made = preview(config, rows=2)
    before = shards(store)
    assert len(made.rows) == 2
    assert made.notes == []
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    trained = [hidden(row) for row in in_training(config, store, tokenizer, 2)]
    assert [as_shown(row) for row in made.rows] == trained
    assert before.items() <= shards(store).items()  # prepare made none of them again
    assert len(before) < len(shards(store)) or "unit_rows=1000" in str(changes)


def test_more_rows_than_there_are_and_turns_that_are_estimated(recipe, own):
    made = preview(load_config(recipe, *own("a", "b")), rows=1000)
    assert 2 < len(made.rows) < 1000
    assert {document.dataset for row in made.rows for document in row} == {"a", "b"}
    assert made.notes[0] == f"{len(made.rows)} packed rows of the 1000 asked for: the first shards hold no more of them"
    assert made.notes[1] == "the datasets' turns are estimated from the first shards: a, b have more"
    made = preview(load_config(recipe, *own("a"), "mix.order=length"), rows=1)
    assert made.notes == [
        "mix.order is length: a run sorts the rows of all shards, here stand only those of the first ones"
    ]


@pytest.mark.parametrize("overlong", ["split", "truncate"])
def test_a_part_of_a_document_is_marked(recipe, own, tmp_path, overlong):
    answer = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "long " * 60}]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [{"messages": answer}, chat(1), chat(2)])
    )
    made = preview(
        load_config(recipe, *own("a"), f"pack.overlong={overlong}", "validation=null", "pack.validation_fraction=0"),
        rows=9,
    )
    cut = {(document.source.rpartition(" ")[2], document.is_cut) for row in made.rows for document in row}
    assert cut == {("1", True), ("2", False), ("3", False)}


def test_a_dataset_whose_first_shard_has_no_row_shows_the_next(recipe, store, own, tmp_path):
    config = load_config(recipe, *own("a", preprocess="[{length: {min_chars: 40}}]"))
    short = [json.dumps(chat(1)) + "\n"] * 12
    (tmp_path / "a.jsonl").write_text("".join(short + [json.dumps(chat(number)) + "\n" for number in range(0, 300, 5)]))
    made = preview(config, rows=1)
    assert made.rows[0][0].tokens > 40
    (tmp_path / "a.jsonl").write_text("".join(short * 10))
    with pytest.raises(
        UserError, match=r"mix\.datasets\.0 \(a\): no row is left to train on \(120 rows; left out: leng"
    ):
        preview(config, rows=1)


def test_text_of_the_data_stays_text(recipe, own, tmp_path):
    made = preview(load_config(recipe, *own("a")), rows=5)
    page = tmp_path / "page.html"
    write_preview(made, page, name="<b>")
    html = page.read_text()
    assert "<script" not in html
    assert html.count("<pre>") == html.count("</pre>") == sum(len(row) for row in made.rows)
    assert "a&lt;script&gt;alert(1)&lt;/script&gt;&lt;/pre&gt;&amp;amp;␛[2J␀é[bold]x[/]" in html
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", html)
    printed = io.StringIO()
    print_preview(made, to=Console(file=printed, force_terminal=True, width=80, soft_wrap=True, markup=False))
    assert "\x1b[2J" not in printed.getvalue()
    assert "[bold]x[/]" in re.sub(r"\x1b\[[\d;]*m", "", printed.getvalue())


def test_learned_is_told_apart_with_and_without_colours(recipe, own):
    made = preview(load_config(recipe, *own("a")), rows=1)
    for settings, sign in [({"force_terminal": True, "color_system": "truecolor"}, "\x1b[32mit is "), ({}, "⟦it is ")]:
        printed = io.StringIO()
        print_preview(
            made, to=Console(file=printed, width=80, soft_wrap=True, markup=False, no_color=False, **settings)
        )
        assert printed.getvalue().count(sign) == len(made.rows[0])
    document = made.rows[0][0]
    assert [(p.text, p.kind) for p in document.pieces[-3:]] == [
        (document.pieces[-3].text, "target"), ("<|im_end|>", "target special"), ("\n", "context"),
    ]  # fmt: skip


def test_the_command_prints_rows_to_stdout_and_progress_to_stderr(recipe, own, capsys, tmp_path):
    command = ["preview", str(recipe), *own("a"), "smoke={prompts: 2}"]  # needs no vLLM
    assert main([*command, "-n", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("packed row ") == 2
    assert printed.out.splitlines()[0].strip("─ ").startswith("packed row 1: ")
    assert "⟦it is" in printed.out
    assert "ingest data" in printed.err
    assert "packed row 1" not in printed.err
    assert main([*command, "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/page.html\n"
    for where, says in [("none/page.html", "none is no folder; make it first"), ("", "is a folder; name a file")]:
        assert main([*command, "--html", str(tmp_path / where)]) == 1
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert error[0].endswith(says)
    assert main([*command, "-n", "0"]) == 2
    assert console.stderr
