"""Batches and mixes: nothing leaks between documents, and every dataset gets its share."""

import numpy as np
import pytest
import torch
from packed_rows import Rows, mix_of

from controlllm.config import DatasetConfig, MixConfig
from controlllm.data.catalog import CATALOG
from controlllm.data.loader import IGNORED, collate
from controlllm.data.probes import HELD_OUT_SEED, PROBES
from controlllm.data.sources import read_rows
from controlllm.train import attention


def packed(*documents):
    return {
        "input_ids": np.concatenate(documents),
        "target": np.ones(sum(map(len, documents)), bool),
        "lengths": np.array([len(d) for d in documents]),
    }


def test_distant_seeds_give_other_puzzles():
    source = CATALOG["puzzles"].source
    train, held_out = (
        # Sums and words are few enough to come again; ingest leaves those out of training.
        {row["question"] for row in read_rows(source, rows=400, seed=seed) if row["kind"] in ("gcd", "number_sorting")}
        for seed in (1, HELD_OUT_SEED)
    )
    assert not train & held_out
    assert list(read_rows(source, rows=8, seed=1)) == list(read_rows(source, rows=8, seed=1))


@pytest.mark.parametrize("name", sorted(name for name in PROBES if not name.startswith("bigbench")))
def test_every_probe_has_items(name):
    """Those of BIG-bench are fetched: test_offline_probes.py."""
    probe = PROBES[name]
    items = [item for row in read_rows(probe.source, rows=40, seed=HELD_OUT_SEED) for item in probe.items(row)]
    assert len(items) >= 15
    for item in items:
        assert item.get("text") or item.get("prompt") or item["messages"]
        if probe.kind == "choice":
            assert len(item["choices"]) == 4
            assert 0 <= item["answer"] < 4


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


def test_order_is_the_same_for_any_number_of_processes():
    mix = mix_of(Rows(packed(np.array([i, i])) for i in range(13)), seed=3)

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


def ones_and_twos(tokens=1):
    """Four rows of ones, and four of twos that are so many tokens long."""
    return Rows([packed(np.array([1] * 2))] * 4, "a"), Rows([packed(np.array([2] * 2 * tokens))] * 4, "b")


def share(mix, count, dataset=2):
    return sum(int(mix.row(i)["input_ids"][0]) == dataset for i in range(count))


def test_epochs_repeat_rows():
    datasets = [DatasetConfig(name="a"), DatasetConfig(name="b", epochs=2.5)]
    assert share(mix_of(*ones_and_twos(), datasets=datasets), 14) == 10


def test_weights_are_shares_of_tokens():
    datasets = [DatasetConfig(name="a", weight=1), DatasetConfig(name="b", weight=3)]
    assert share(mix_of(*ones_and_twos(), datasets=datasets), 40) == 30
    assert share(mix_of(*ones_and_twos(tokens=3), datasets=datasets), 40) == 20


def test_a_temperature_gives_the_small_more():
    small, large = Rows([packed(np.array([2, 2]))] * 4, "b"), Rows([packed(np.array([1, 1]))] * 36, "a")
    assert share(mix_of(large, small), 40) == 4
    assert share(mix_of(large, small, temperature=2), 40) == 10  # 2 : 6


@pytest.mark.parametrize(("datasets", "says"), [
    ([{"name": "a", "weight": 1.0}, {"name": "b"}], "a has a weight and b has none"),
    ([{"name": "a", "weight": 1.0, "epochs": 2.0}], "leave epochs and temperature out"),
])  # fmt: skip
def test_shares_are_said_in_one_way(datasets, says):
    with pytest.raises(ValueError, match=says):
        MixConfig.model_validate({"datasets": datasets})
