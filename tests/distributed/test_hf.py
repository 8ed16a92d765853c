"""transformers' Trainer does what the native trainer does: the same losses, the same checkpoints."""

import pytest
from ranks import run
from tiny_training import curves

from controlllm.train.distributed import World

pytestmark = pytest.mark.distributed

STEPS = 50
SHARDED = {"kind": "fsdp"}
EXACT = ("lr", "tokens", "targets", "step")
LOSSES = ("loss", "cross_entropy", "divergence")


def cases(trainer, **changes):
    return [
        (
            f"{trainer}-{method}-{micro}",
            method,
            {"trainer": trainer, "micro_batch_size": micro, "steps": STEPS, "lr": 2e-3, **changes},
        )
        for method in ("control", "lora", "full")
        for micro in (1, 4)
    ]


@pytest.fixture(scope="module")
def native(tiny_base, tmp_path_factory):
    return curves(World(), tiny_base, tmp_path_factory.mktemp("native"), cases("native"))


def close(found, native):
    for name, rows in found.items():
        _, method, micro = name.split("-")
        assert len(rows) == STEPS
        for row, expected in zip(rows, native[f"native-{method}-{micro}"], strict=True):
            assert [row[key] for key in EXACT] == [expected[key] for key in EXACT], name
            losses = [[one.get(key) or 0.0 for key in LOSSES] for one in (row, expected)]
            assert losses[0] == pytest.approx(losses[1], abs=1e-5, rel=0), name
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3), name


def test_alone(native, tiny_base, tmp_path):
    close(curves(World(), tiny_base, tmp_path, cases("transformers")), native)


@pytest.mark.parametrize("parallel", [{"kind": "ddp"}, SHARDED], ids=lambda p: p["kind"])
def test_two_processes(native, tiny_base, tmp_path, parallel):
    wanted = cases("transformers", parallel=parallel)
    for found in run(curves, 2, str(tiny_base), str(tmp_path), wanted):
        close(found, native)
