"""Virtual tokens belong to no block: shared by processes, accumulated, recomputed and resumed they train the same."""

from pathlib import Path

import numpy as np
import pytest
from ranks import run
from tiny_training import facts, make

from controlllm.train.distributed import World
from controlllm.train.trained import whole_trained_tensors

pytestmark = pytest.mark.distributed

SHARD, CONSTANT = {"kind": "fsdp"}, {"kind": "constant"}
WAYS = [
    {},
    {"micro_batch_size": 2},
    {"global_batch_size": 5},
    {"parallel": SHARD, "activation_checkpointing": "selective"},
    {"parallel": SHARD | {"frozen": "replicate", "reshard_after_forward": False}, "global_batch_size": 5},
]
KINDS = ("prompt", "prefix")


def trained(world, base, folder, ways):
    """The first steps of every kind and way."""
    found = {}
    for kind in KINDS:
        for number, way in enumerate(ways):
            method = {"prompt": {"kind": kind, "num_virtual_tokens": 3}}
            place = Path(folder) / f"{kind}-{number}"
            found[kind, number] = facts(make(world, Path(base), place, method, **way), 3)
    return found


def gone_on(world, base, folder):
    """What three steps in a row train, two with one more from their checkpoint, and three by transformers' Trainer."""
    results = []
    for name, stops, way in (
        ("whole", [3], {"parallel": SHARD}),
        ("stopped", [2, 3], {"parallel": SHARD}),
        ("other", [3], {"trainer": "transformers"}),
    ):
        for steps in stops:
            method = {"prompt": {"kind": "prefix", "num_virtual_tokens": 3}}
            trainer = make(world, Path(base), Path(folder) / name, method, steps=steps, schedule=CONSTANT, **way)
            trainer.train()
        (weight,) = whole_trained_tensors(trainer.parallel.model, keep=True).values()
        results.append(weight.numpy())
    return results


def both(world, base, folder):
    return trained(world, base, folder, WAYS), gone_on(world, base, folder)


@pytest.fixture(scope="module")
def ranks(tiny_base, tmp_path_factory):
    return run(both, 2, str(tiny_base), str(tmp_path_factory.mktemp("shared")))


@pytest.fixture(scope="module")
def alone(tiny_base, tmp_path_factory):
    plain = [{k: v for k, v in way.items() if k == "global_batch_size"} for way in (WAYS[0], WAYS[2])]
    return trained(World(), str(tiny_base), str(tmp_path_factory.mktemp("alone")), plain)


def test_shared_is_alone(ranks, alone):
    for shared, _ in ranks:
        for (kind, number), found in shared.items():
            want = alone[kind, int("global_batch_size" in WAYS[number])]
            said = f"{kind} {WAYS[number]}"
            assert found["counts"] == want["counts"], said
            np.testing.assert_allclose(found["losses"], want["losses"], atol=1e-6, rtol=1e-5, err_msg=said)
            assert list(found["gradients"]) == ["virtual_tokens.weight"]
            for name, gradient in found["gradients"].items():
                np.testing.assert_allclose(gradient, want["gradients"][name], atol=1e-6, rtol=1e-5, err_msg=said)
    assert alone["prompt", 0]["losses"] != alone["prefix", 0]["losses"]


def test_stopped_and_gone_on_is_the_whole_run(ranks):
    for _, (whole, stopped, other) in ranks:
        np.testing.assert_array_equal(whole, stopped)
        np.testing.assert_allclose(whole, other, atol=1e-5, rtol=1e-5)
