"""From rows to shards: every row is somewhere, tokens are the template's, any number of builders makes the same."""

import json
import os
import random
import shutil

import numpy as np
import pytest

from controlllm.config import DatasetConfig, PackConfig
from controlllm.data.build import make_job, make_units, prepare_dataset
from controlllm.data.held_out import HeldOut
from controlllm.data.manifest import list_source
from controlllm.data.render import render
from controlllm.data.shelf import StoredShelf
from controlllm.data.workers import unit_key
from controlllm.errors import UserError

WORDS = ["the", "a", "stone", "river", "Über", "你好", "runs,", "over", "<b>x</b>", "12", "and", "…", "again"]


def chat(seed, turns=2):
    words = random.Random(seed)

    def text():
        return " ".join(words.choices(WORDS, k=words.randint(1, 12)))

    return [{"role": ("user", "assistant")[i % 2], "content": f"{seed}: {text()}"} for i in range(turns)]


def rows(count, start=0):
    return [{"messages": chat(seed, turns=2 + 2 * (seed % 3))} for seed in range(start, start + count)]


def write(file, made):
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "chat.jsonl", rows(300))


class Run:
    """Prepares a source, with some settings changed."""

    def __init__(self, base, folder):
        self.base, self.shards = base, folder / "shards"

    def job(self, source, *, held_out=None, dataset=None, **pack):
        settings = PackConfig.model_validate({"context_length": 512, "unit_rows": 64, "max_bad_rows": 0.0} | pack)
        config = DatasetConfig.model_validate(
            {"name": "a", "source": str(source), "format": "messages"} | (dataset or {})
        )
        manifest = list_source(config.source, unit_rows=settings.unit_rows, rows=config.rows)
        return make_job(config, manifest, tokenizer_folder=self.base, pack=settings, held_out=held_out), manifest

    def __call__(self, source, *, workers=1, **settings):
        job, manifest = self.job(source, **settings)
        return prepare_dataset(job, manifest, shards=self.shards, workers=workers)

    def shelf(self, made):
        return StoredShelf("a", made.units, str(self.shards))


@pytest.fixture
def prepared(tiny_base, tmp_path):
    return Run(tiny_base, tmp_path)


def documents(shelf, kind="train"):
    """(ids, targets, source row) of every document."""
    for unit in range(shelf.units):
        for number in range(shelf.rows_of(unit, kind)):
            row = shelf.read(unit, number, kind)
            edges = np.cumsum([0, *row["lengths"]])
            for a, b, source in zip(edges, edges[1:], row["rows"], strict=False):
                yield row["input_ids"][a:b].tolist(), row["target"][a:b].tolist(), int(source)


def test_every_document_is_what_the_template_makes_of_its_row(prepared, source, tokenizer):
    made = prepared(source)
    assert len(made.units) > 2
    found = {number: (ids, target) for ids, target, number in documents(prepared.shelf(made))}
    assert sorted(found) == list(range(1, 301))
    for number, row in enumerate(rows(300), start=1):
        tokens = render(row["messages"], tokenizer)
        assert found[number] == (tokens.input_ids, tokens.target)


@pytest.mark.parametrize("strategy", ["best_fit", "best_fit_stream", "pad", "wrap"])
def test_every_token_is_packed_once(prepared, source, strategy):
    made, plain = prepared(source, strategy=strategy), prepared(source)
    shelf = prepared.shelf(made)
    assert made.tokens == plain.tokens == sum(len(ids) for ids, _, _ in documents(shelf))
    assert made.total("targets") == plain.total("targets")
    packed = [shelf.read(u, r) for u in range(shelf.units) for r in range(shelf.rows_of(u))]
    assert all(row["lengths"].sum() == len(row["input_ids"]) <= 512 for row in packed)
    if strategy == "pad":
        assert all(len(row["lengths"]) == 1 for row in packed)
    if strategy == "wrap":
        assert sum(len(row["input_ids"]) < 512 for row in packed) <= shelf.units


def test_processes_make_the_same_shards(prepared, source, tmp_path):
    alone = prepared(source)
    shutil.rmtree(prepared.shards)
    together = prepared(source, workers=2)
    assert alone.units == together.units
    assert together.computed == len(together.units)


def test_what_is_there_is_not_made_again(prepared, source, tmp_path):
    first = prepared(source)
    again = prepared(source)
    assert (again.units, again.computed) == (first.units, 0)
    prepared.shelf(first).path(1, "train").unlink()
    assert prepared(source).computed == 1


def keys(run, source, **settings):
    job, manifest = run.job(source, **settings)
    return [unit_key(job, n, unit) for n, unit in enumerate(manifest.units)]


@pytest.mark.parametrize("change", [
    {"context_length": 511}, {"strategy": "pad"}, {"strategy": "wrap"}, {"overlong": "drop"}, {"overlong": "split"},
    {"targets": "all"}, {"date": "2024-12-31"}, {"validation_fraction": 0.1},
    {"dataset": {"fraction": 0.5}}, {"dataset": {"preprocess": [{"length": {"min_chars": 3}}]}},
    {"dataset": {"preprocess": [{"strip": {}}]}}, {"dataset": {"format": "sharegpt"}},
    {"dataset": {"fields": {"messages": "other"}}},
    {"held_out": HeldOut(np.array([1], np.uint64))}, {"held_out": HeldOut(np.array([2], np.uint64))},
])  # fmt: skip
def test_what_changes_tokens_changes_every_key(prepared, source, change):
    assert not set(keys(prepared, source)) & set(keys(prepared, source, **change))


@pytest.mark.parametrize("change", [
    {"max_bad_rows": 0.5}, {"streaming": True}, {"tokenizer": "transformers"},
    {"dataset": {"name": "b"}}, {"dataset": {"epochs": 2.0}}, {"dataset": {"weight": 2.0}},
    {"dataset": {"dedup": True}},
])  # fmt: skip
def test_what_changes_no_token_changes_no_key(prepared, source, change):
    assert keys(prepared, source) == keys(prepared, source, **change)


def test_a_file_counts_by_its_bytes_wherever_and_whenever(prepared, source, tmp_path):
    before = keys(prepared, source)
    os.utime(source, (0, 0))
    assert keys(prepared, source) == before
    moved = tmp_path / "another name.jsonl"
    source.rename(moved)
    assert keys(prepared, moved) == before
    moved.write_text(moved.read_text()[:-20] + "changed" + moved.read_text()[-13:])
    changed = keys(prepared, moved)
    assert changed[:-1] == before[:-1]
    assert changed[-1] != before[-1]


def test_a_file_that_changes_after_it_was_listed_is_noticed(prepared, source):
    job, manifest = prepared.job(source)
    write(source, rows(301))
    with pytest.raises(UserError, match="changed since"):
        prepare_dataset(job, manifest, shards=prepared.shards)


def test_validation_never_meets_training_and_stays_when_rows_are_added(prepared, source):
    made = prepared(source, validation_fraction=0.2)
    train, held_back = ({n for *_, n in documents(prepared.shelf(made), kind)} for kind in ("train", "validation"))
    assert train | held_back == set(range(1, 301))
    assert not train & held_back
    assert 30 < len(held_back) < 90
    write(source, rows(450))
    more = prepared(source, validation_fraction=0.2)
    assert {n for *_, n in documents(prepared.shelf(more), "validation") if n <= 300} == held_back


def test_the_same_question_is_on_one_side_whoever_answers(prepared, tmp_path):
    def asked(i):
        return [{"role": "user", "content": f"question {i // 2}"}, {"role": "assistant", "content": f"answer {i}"}]

    source = write(tmp_path / "twice.jsonl", [{"messages": asked(i)} for i in range(200)])
    made = prepared(source, validation_fraction=0.3)
    held_back = {n for *_, n in documents(prepared.shelf(made), "validation")}
    assert held_back
    assert all(
        ((n - 1) % 2 == 0 and n + 1 in held_back) or ((n - 1) % 2 == 1 and n - 1 in held_back) for n in held_back
    )


def test_repeated_and_measured_rows_are_left_out_and_counted(prepared, tmp_path):
    source = write(tmp_path / "a.jsonl", [*rows(80), *rows(40), *rows(5, start=200)])
    held_out = HeldOut.of([{"messages": chat(201)}, {"prompt": "never asked"}], mode="exact", words=13)
    made = prepared(source, dataset={"dedup": True}, held_out=held_out)
    numbers = [n for *_, n in documents(prepared.shelf(made))]
    assert sorted(numbers) == [*range(1, 81), 121, 123, 124, 125]
    left_out = [sum(unit["filtered"].get(name, 0) for unit in made.units) for name in ("repeated", "measured")]
    assert left_out == [40, 1]
    assert made.rows == 125


def test_a_fraction_is_stable_when_rows_are_added(prepared, source):
    few = {n for *_, n in documents(prepared.shelf(prepared(source, dataset={"fraction": 0.3})))}
    write(source, rows(400))
    more = {n for *_, n in documents(prepared.shelf(prepared(source, dataset={"fraction": 0.3})))}
    assert 50 < len(few) < 130
    assert {n for n in more if n <= 300} == few


BAD = [
    '{"messages": ',
    "[1]",
    '{"text": "x"}',
    '{"messages": [{"role": "user", "content": "alone"}]}',
    '{"messages": null}',
]


def test_bad_rows_are_set_aside_with_their_place(prepared, tmp_path):
    good = [json.dumps(row) for row in rows(95)]
    lines = [*good[:50], *BAD, *good[50:]]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(lines) + "\n")
    made = prepared(source, max_bad_rows=0.06)
    assert (made.rows, sum(unit["bad_rows"] for unit in made.units)) == (100, 5)
    assert sum(unit["packed_documents"] for unit in made.units) == 95
    assert [row["row"] for unit in made.units for row in unit["bad"]] == [51, 52, 53, 54, 55]
    with pytest.raises(
        UserError, match=r"dataset \(a\): .*a\.jsonl:51: .*5 of 100 rows cannot be used; pack.max_bad_rows"
    ):
        prepared(source, max_bad_rows=0.04)


def test_a_row_that_is_too_long_is_named(prepared, source):
    with pytest.raises(UserError, match=r"chat\.jsonl:\d+: \d+ tokens do not fit into pack.context_length 64"):
        prepared(source, context_length=64)


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
def test_long_rows_are_counted(prepared, source, overlong):
    made = prepared(source, context_length=128, overlong=overlong)
    assert all(len(ids) <= 128 for ids, _, _ in documents(prepared.shelf(made)))
    assert all(any(target) for _, target, _ in documents(prepared.shelf(made)))
    cut = {name: sum(unit["cut"].get(name, 0) for unit in made.units) for name in ("split", "truncated")}
    dropped = sum(unit["filtered"].get("overlong", 0) for unit in made.units)
    assert {"split": cut["split"], "truncate": cut["truncated"], "drop": dropped}[overlong] > 0
    assert sum(unit["packed_documents"] for unit in made.units) + dropped == 300


def test_a_dataset_without_a_row_left_says_what_took_them(prepared, source):
    with pytest.raises(UserError, match=r"no row is left to train on \(300 rows; left out: length: 300\)"):
        prepared(source, dataset={"preprocess": [{"length": {"min_chars": 10**6}}]})


def test_the_first_unit_is_there_before_the_others(prepared, source):
    job, manifest = prepared.job(source)
    made = make_units(job, manifest, range(len(manifest.units)), shards=prepared.shards, workers=1)
    assert next(made)[0] == 0
    assert len(list(prepared.shards.glob("*.json"))) == 1


def test_an_error_in_a_process_is_the_callers(prepared, tmp_path):
    made = rows(300)
    made[250] = {"messages": chat(1, turns=200)}
    with pytest.raises(UserError, match=r"a\.jsonl:251: \d+ tokens do not fit"):
        prepared(write(tmp_path / "a.jsonl", made), workers=2)


@pytest.mark.parametrize(("settings", "says"), [
    ({"overlong": "drop", "context_length": 16}, r"300 rows; left out: overlong: 300"),
    ({"validation_fraction": 0.9999}, r"300 rows; left out: validation: 300"),
])  # fmt: skip
def test_nothing_left_is_an_error_whatever_took_it(prepared, source, settings, says):
    with pytest.raises(UserError, match=says):
        prepared(source, **settings)
