"""DeepSpeed ZeRO on two processes: the native trainer's losses, checkpoints and weights."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from ranks import run
from tiny_training import METHODS, make

from controlllm.config import TrainConfig
from controlllm.errors import UserError
from controlllm.train.distributed import World
from controlllm.train.trained import whole_trained_tensors
from controlllm.train.zero import check_start

pytestmark = pytest.mark.distributed


def zero(stage, *, offload=False, **changes):
    parallel = {"kind": "deepspeed", "zero_stage": stage, "cpu_offload": offload}
    return {"trainer": "transformers", "parallel": parallel} | changes


LONG = {"steps": 20, "lr": 2e-3}
ONE = {"global_batch_size": 2}
THREE = {"global_batch_size": 5}  # three micro-batches, the last of them empty on one process
ALIKE = [
    ("control", zero(2, **LONG, **THREE, offload=True)),
    ("lora", zero(3, **LONG, **ONE, offload=True)),
    ("full", zero(1, **LONG, **ONE, offload=True)),
]
EVERY = [
    (method, zero(stage, offload=offload, **LONG, **rows))
    for method in ("control", "lora", "full")
    for stage in (1, 2, 3)
    for offload in (False, True)
    for rows in (ONE, THREE)
]
MOVED = {"control": {"num_expanded": 2, "train_alpha": False, "alpha_schedule": {"kind": "linear", "final": 0.9}}}
SHORT = {"steps": 4, "lr": 2e-3}
OTHERS = [
    (MOVED, zero(3, **SHORT), 1e-5),
    ("hybrid", zero(3, **SHORT, activation_checkpointing="full"), 1e-5),
    ("partial", zero(2, **SHORT, activation_checkpointing="selective"), 1e-5),
    ("control", zero(2, **SHORT, precision="bf16"), 1e-5),
    ("control", zero(3, **SHORT, precision="bf16"), 2e-3),  # the gates are computed in other steps
    ("control", zero(2, **SHORT, precision="fp16"), 2e-4),
]
KEPT = {"lr": 2e-3, "schedule": {"kind": "constant"}, "global_batch_size": 4, "checkpoint": {"every": 2}}
DDP, SHARDED = {"steps": 2}, {"steps": 4, "parallel": {"kind": "fsdp"}}
# Runs that go on in one folder, each to its own last step; and the one whose numbers they must end with.
CHAINS = {
    "whole 1": [zero(1, steps=4)],
    "whole 3": [zero(3, steps=4, offload=True)],
    "resumed 1": [zero(1, steps=2), zero(1, steps=4)],
    "resumed 3": [zero(3, steps=2, offload=True), zero(3, steps=4, offload=True)],
    "from DDP": [DDP, zero(3, steps=4)],
    "to FSDP": [zero(2, steps=2), SHARDED],
    "other stage": [zero(3, steps=2), zero(1, steps=4)],
}


def plain(changes):
    """The same run without DeepSpeed."""
    return {key: value for key, value in changes.items() if key not in ("trainer", "parallel")}


def trained(world, base, folder, method, changes):
    """Losses and norms by step, trained tensors, and numbers in this process's optimizer state."""
    trainer = make(
        world, Path(base), Path(folder), METHODS.get(method) if isinstance(method, str) else method, **changes
    )
    trainer.train()
    rows = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    state = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state
    return {
        "curve": [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row],
        "tensors": {name: t.numpy() for name, t in whole_trained_tensors(trainer.model, keep=True).items()},
        "state": sum(tensor.numel() for one in state.values() for tensor in one.values() if tensor.ndim),
    }


def each(world, base, folder, cases):
    return [trained(world, base, f"{folder}/{world.size}-{n}", *case[:2]) for n, case in enumerate(cases)]


def chained(world, base, folder):
    return {
        name: [trained(world, base, f"{folder}/{name}", "control", KEPT | changes) for changes in runs][-1]
        for name, runs in CHAINS.items()
    }


def not_a_number(world, base, folder):
    """Of stages 2 and 3: which steps were left out, and whether the second one moved a weight."""
    found = []
    for stage in (2, 3):
        trainer = make(world, Path(base), Path(folder) / f"nan-{stage}", METHODS["control"], **zero(stage, steps=3))
        given, seen = trainer.loss, {}

        def loss(inputs, trainer=trainer, given=given, seen=seen):
            tensors = whole_trained_tensors(trainer.model, keep=True)
            seen.setdefault(trainer.step, {name: t.numpy().copy() for name, t in tensors.items()})
            return given(inputs) * (math.nan if trainer.step == 1 and world.rank == 1 else 1.0)

        trainer.loss = loss
        trainer.train()
        rows = map(json.loads, (Path(folder) / f"nan-{stage}" / "metrics.jsonl").read_text().splitlines())
        same = [all(np.array_equal(seen[a][n], seen[b][n]) for n in seen[a]) for a, b in ((0, 1), (1, 2))]
        found.append(([row.get("skipped", 0) for row in rows if "loss" in row], same))
    return found


def everything(world, base, folder, cases):
    return {
        "each": each(world, base, f"{folder}/each", cases),
        "chained": chained(world, base, f"{folder}/chained"),
        "not a number": not_a_number(world, base, folder),
    }


@pytest.fixture(scope="module")
def both(tiny_base, tmp_path_factory):
    """What two processes found; they are started once."""
    return run(everything, 2, str(tiny_base), str(tmp_path_factory.mktemp("zero")), [*ALIKE, *OTHERS], timeout=900)


def alone(base, folder, cases):
    done = {}
    for method, changes in [case[:2] for case in cases]:
        key = json.dumps([method, plain(changes)])
        if key not in done:
            done[key] = trained(World(), base, f"{folder}/{len(done)}", method, plain(changes))
        yield done[key]


def close(found, expected, tolerance, name):
    np.testing.assert_allclose(
        [loss for loss, _ in found["curve"]],
        [loss for loss, _ in expected["curve"]],
        rtol=0,
        atol=tolerance,
        err_msg=name,
    )
    np.testing.assert_allclose(
        [norm for _, norm in found["curve"]],
        [norm for _, norm in expected["curve"]],
        rtol=100 * tolerance,
        err_msg=name,
    )
    assert found["tensors"].keys() == expected["tensors"].keys()


def test_losses_are_the_native_ones(both, tiny_base, tmp_path):
    cases = [*[(*case, 1e-5) for case in ALIKE], *OTHERS]
    for number, (case, native) in enumerate(zip(cases, alone(tiny_base, tmp_path, cases), strict=True)):
        for rank in both:
            close(rank["each"][number], native, case[2], str(case))


@pytest.mark.slow
def test_losses_are_the_native_ones_everywhere(tiny_base, tmp_path):
    ranks = run(each, 2, str(tiny_base), str(tmp_path / "zero"), EVERY, timeout=3000)
    for number, (case, native) in enumerate(zip(EVERY, alone(tiny_base, tmp_path, EVERY), strict=True)):
        for rank in ranks:
            close(rank[number], native, 1e-5, str(case))


def test_only_what_is_trained_has_state_and_each_process_its_part(both):
    for number, _ in enumerate(ALIKE):
        numbers = sum(tensor.size for tensor in both[0]["each"][number]["tensors"].values())
        states = [rank["each"][number]["state"] for rank in both]
        assert 2 * numbers <= sum(states) <= 2 * numbers + 1000  # and what fills up the last part
        assert max(states) <= numbers + 500


@pytest.mark.parametrize("stage", ["1", "3"])
def test_resumed_is_uninterrupted(both, stage):
    for rank in both:
        resumed, whole = rank["chained"][f"resumed {stage}"], rank["chained"][f"whole {stage}"]
        assert resumed["curve"] == whole["curve"]
        assert all(np.array_equal(resumed["tensors"][name], whole["tensors"][name]) for name in whole["tensors"])


@pytest.mark.parametrize("chain", ["from DDP", "to FSDP", "other stage"])
def test_another_way_of_sharing_goes_on(both, chain):
    whole = both[0]["chained"]["whole 1"]
    for rank in both:
        found = rank["chained"][chain]
        np.testing.assert_allclose(found["curve"], whole["curve"], rtol=1e-6)
        for name, tensor in whole["tensors"].items():
            np.testing.assert_allclose(found["tensors"][name], tensor, atol=1e-4, err_msg=name)


def test_a_gradient_that_is_no_number_moves_nothing(both):
    for rank in both:
        for skipped, same in rank["not a number"]:
            assert skipped == [0, 1, 0]
            assert same == [False, True]


def test_start_is_refused_without_a_launcher_and_without_gpus(monkeypatch):
    def config(**parallel):
        return TrainConfig.model_validate({"trainer": "transformers", "parallel": {"kind": "deepspeed"} | parallel})

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="start with torchrun"):
        check_start(config(), World())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="hpz 3 must divide the 4 processes"):
        check_start(config(hpz=3), World(0, 4))
    with pytest.raises(UserError, match="qgz reduces between nodes"):
        check_start(config(qgz=True), World(0, 2))
    with pytest.raises(UserError, match="qwz: DeepSpeed quantises on GPUs only"):
        check_start(config(qwz=True), World(0, 4))
