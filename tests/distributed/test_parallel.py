"""Any number of processes, any way of sharing, any accumulation: the same losses, gradients and weights (T5)."""

import numpy as np
import pytest
from ranks import run
from tiny_training import cases

from controlllm.config import FSDP
from controlllm.errors import UserError
from controlllm.train.distributed import World
from controlllm.train.parallel import device_mesh

pytestmark = pytest.mark.distributed

SHARD, REPLICATE = {"kind": "fsdp"}, {"kind": "fsdp", "frozen": "replicate"}
WAYS = [
    ("control", {}),
    ("control", {"micro_batch_size": 2}),
    ("control", {"global_batch_size": 5}),  # ranks with fewer micro-batches, and with none
    ("control", {"parallel": SHARD}),
    ("control", {"parallel": REPLICATE, "global_batch_size": 5}),
    ("control", {"parallel": {"kind": "fsdp", "reshard_after_forward": False, "cpu_offload": True}}),
    ("control", {"parallel": SHARD, "activation_checkpointing": "full"}),
    ("hybrid", {"parallel": SHARD, "micro_batch_size": 2}),
    ("hybrid", {}),
    ("lora", {"parallel": SHARD}),
    ("lora", {}),
    ("dora", {"parallel": SHARD}),
    ("ia3", {"parallel": REPLICATE}),
    ("lora twins", {"parallel": SHARD, "micro_batch_size": 2}),
    ("dora twins", {"parallel": SHARD, "activation_checkpointing": "selective"}),
    ("dora twins", {}),
    ("ia3 twins", {"parallel": SHARD | {"cpu_offload": True}}),
    ("ia3 twins", {"parallel": REPLICATE}),
    ("partial", {"parallel": SHARD}),
    ("full", {"parallel": SHARD}),
    ("full", {}),
]
PLAIN = [(method, {k: v for k, v in changes.items() if k == "global_batch_size"}) for method, changes in WAYS]


@pytest.fixture(scope="module")
def alone(tiny_base, tmp_path_factory):
    return cases(World(), str(tiny_base), str(tmp_path_factory.mktemp("alone")), PLAIN)


@pytest.mark.parametrize("size", [2, 4])
def test_shared_is_alone(tiny_base, tmp_path, alone, size):
    ways = WAYS if size == 2 else [*WAYS[2:5], *WAYS[7:8]]
    if size == 4:
        ways = [
            *ways,
            ("control", {"parallel": SHARD | {"replicas": 2}}),
            ("full", {"parallel": SHARD | {"replicas": 2}}),
        ]
    ranks = run(cases, size, str(tiny_base), str(tmp_path), ways, timeout=500)
    for number, (method, changes) in enumerate(ways):
        want = next(a for a, (m, c) in zip(alone, PLAIN, strict=True)
                    if m == method and c.get("global_batch_size") == changes.get("global_batch_size"))  # fmt: skip
        for rank in ranks:
            same(rank[number], want, f"{method} {changes}")


def same(found, want, way):
    assert found["counts"] == want["counts"], way
    np.testing.assert_allclose(found["losses"], want["losses"], atol=1e-6, rtol=1e-5, err_msg=way)
    assert found["gradients"].keys() == want["gradients"].keys()
    for name, tensor in want["gradients"].items():
        np.testing.assert_allclose(found["gradients"][name], tensor, atol=1e-6, rtol=1e-5, err_msg=f"{way} {name}")


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="2 replicas × 8 shards need 16 processes, but there are 24"):
        device_mesh(World(0, 24), FSDP(replicas=2, shards=8))
    with pytest.raises(UserError, match="start with torchrun"):
        device_mesh(World(), FSDP())
