"""Sources, labels, packing, order: what goes in comes out, and nothing leaks between documents."""

import gzip
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from controlllm.config import DatasetConfig
from controlllm.data.catalog import CATALOG, find_dataset
from controlllm.data.loader import IGNORED, Mix, PackedRows, collate
from controlllm.data.pack import best_fit
from controlllm.data.probes import HELD_OUT_SEED, PROBES
from controlllm.data.render import render
from controlllm.data.sources import read_rows
from controlllm.errors import UserError
from controlllm.train import attention

ROWS = [{"q": "one", "a": "1"}, {"q": "zwei", "a": "二"}]


def packed(*documents):
    return {
        "input_ids": np.concatenate(documents),
        "target": np.ones(sum(map(len, documents)), bool),
        "lengths": np.array([len(d) for d in documents]),
    }


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet"])
def test_files_give_their_rows(tmp_path, name):
    file = tmp_path / name
    if name.endswith(".gz"):
        with gzip.open(file, "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in ROWS)
    elif name.endswith(".jsonl"):
        file.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif name.endswith(".json"):
        file.write_text(json.dumps(ROWS))
    elif name.endswith(".csv"):
        file.write_text("q,a\none,1\nzwei,二\n")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), file)
    assert list(read_rows(f"file://{file}")) == ROWS
    assert list(read_rows(str(file), rows=1)) == ROWS[:1]


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.jsonl", b'{"q": 1}\n{"q": \n', "a.jsonl:2: not valid JSON"),
    ("a.jsonl", b"[1, 2]\n", "a.jsonl:1: a row is an object of fields, found list"),
    ("a.jsonl", b"\xff\xfe\n", "not UTF-8"),
    ("a.jsonl", b"", "empty"),
    ("a.jsonl.gz", b"no gzip", "damaged gzip"),
    ("a.parquet", b"PAR1nothing", "damaged Parquet"),
    ("a.xyz", b"x", "format not known"),
])  # fmt: skip
def test_bad_files_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        list(read_rows(str(tmp_path / name)))


def test_distant_seeds_give_other_puzzles():
    source = CATALOG["puzzles"].source
    train, held_out = (
        # Sums and words are few enough to come again; ingest leaves those out of training.
        {row["question"] for row in read_rows(source, rows=400, seed=seed) if row["kind"] in ("gcd", "number_sorting")}
        for seed in (1, HELD_OUT_SEED)
    )
    assert not train & held_out
    assert list(read_rows(source, rows=8, seed=1)) == list(read_rows(source, rows=8, seed=1))


@pytest.mark.parametrize("name", sorted(PROBES))
def test_every_probe_has_items(name):
    probe = PROBES[name]
    items = [item for row in read_rows(probe.source, rows=40, seed=HELD_OUT_SEED) for item in probe.items(row)]
    assert len(items) >= 15
    for item in items:
        assert item.get("text") or item.get("prompt") or item["messages"]
        if probe.kind == "choice":
            assert len(item["choices"]) == 4
            assert 0 <= item["answer"] < 4


def test_own_fields():
    config = DatasetConfig(
        name="own", source="x.jsonl", format="prompt_completion", fields={"prompt": "q", "completion": "a"}
    )
    convert = find_dataset(config).convert
    assert convert(ROWS[0])[1] == {"role": "assistant", "content": "1"}
    with pytest.raises(UserError, match="field 'a' is missing or null; the row has: q"):
        convert({"q": "one"})


def test_targets_are_the_answers_and_their_eos(tokenizer):
    turns = [("user", "hi"), ("assistant", "one"), ("user", "one"), ("assistant", "two")]
    tokens = render([{"role": r, "content": c} for r, c in turns], tokenizer)
    learned = tokenizer.decode([i for i, t in zip(tokens.input_ids, tokens.target, strict=True) if t])
    assert learned == "one<|im_end|>two<|im_end|>"


def test_text_is_all_target_and_ends(tokenizer):
    tokens = render("abc", tokenizer)
    assert all(tokens.target)
    assert tokens.input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "document", [[{"role": "user", "content": "hi"}], "  ", [{"role": "assistant", "content": ""}]]
)
def test_nothing_to_learn_is_refused(tokenizer, document):
    with pytest.raises(UserError, match="nothing to learn"):
        render(document, tokenizer)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 80))
def test_packing_keeps_every_document_once(lengths, capacity):
    bins = best_fit(lengths, capacity)
    assert sorted(i for row in bins for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in bins)
    naive: list[int] = []  # free space per bin, by trying every bin
    for length in sorted(lengths, reverse=True):
        fits = [i for i, free in enumerate(naive) if free >= length]
        if fits:
            naive[min(fits, key=lambda i: naive[i])] -= length
        else:
            naive.append(capacity - length)
    assert len(bins) == len(naive)


def test_first_tokens_are_never_targets_and_positions_restart():
    batch = collate([packed(np.array([5, 6, 7]), np.array([8, 9])), packed(np.array([4]))])
    assert batch.labels.tolist() == [[IGNORED, 6, 7, IGNORED, 9, IGNORED]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.cu_seq_lens_q.tolist() == [0, 3, 5, 6]
    assert (batch.targets, batch.tokens) == (3, 6)


@pytest.mark.parametrize("implementation", ["packed", "sdpa", "eager"])
def test_packed_is_unpacked(tiny_model, implementation):
    attention.register()
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 258, size=n) for n in (9, 1, 30, 7, 22)]
    tiny_model.set_attn_implementation(implementation)
    together = run(tiny_model, collate([packed(*documents)]))
    alone = torch.cat([run(tiny_model, collate([packed(d)])) for d in documents], 1)
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["packed", "sdpa"])
def test_another_document_changes_nothing(tiny_model, implementation):
    attention.register()
    tiny_model.set_attn_implementation(implementation)
    a, b, c = np.arange(2, 20), np.arange(30, 45), np.arange(90, 105)
    assert torch.equal(
        run(tiny_model, collate([packed(b, a)]))[:, 15:], run(tiny_model, collate([packed(c, a)]))[:, 15:]
    )


def run(model, batch):
    arguments = {k: v for k, v in batch.arguments().items() if k != "labels"}
    return model(**arguments, use_cache=False).logits.detach()


class Rows(list):
    """Rows that say which they are."""


def test_order_is_the_same_for_any_number_of_processes():
    rows = Rows(packed(np.array([i, i])) for i in range(13))
    mix = Mix([(rows, 1.0)], seed=3)

    def seen(world, steps=6):
        first = {}
        for step in range(steps):
            for rank in range(world):
                for n, batch in enumerate(mix.step(step, global_batch=4, micro_batch=1, rank=rank, world=world)):
                    first[step * 4 + n * world + rank] = int(batch.input_ids[0, 0])
        return [first[i] for i in sorted(first)]

    assert seen(1) == seen(2) == seen(4)
    assert sorted(seen(1)[:13]) == list(range(13))  # an epoch shows every row once
    assert seen(1)[:11] != seen(1)[13:24]  # the next epoch has another order


def test_weights_repeat_rows():
    a, b = Rows(packed(np.array([0])) for _ in range(4)), Rows(packed(np.array([1])) for _ in range(4))
    mix = Mix([(a, 1.0), (b, 2.5)], seed=0)
    first = [int(mix.row(i)["input_ids"][0]) for i in range(mix.epoch_rows)]
    assert (first.count(0), first.count(1)) == (4, 10)


def test_missing_packed_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such packed file"):
        PackedRows(tmp_path / "none.arrow")
