"""Quantised frozen weights with several processes: the losses and gradients of one."""

import numpy as np
import pytest
import tiny_training
from ranks import run
from tiny_training import cases

pytestmark = pytest.mark.distributed

REPLICATE = {"kind": "fsdp", "frozen": "replicate"}
WAYS = [
    ("q-control", {}),
    ("q-control", {"parallel": REPLICATE}),
    ("q-lora", {"parallel": REPLICATE, "activation_checkpointing": "full"}),
    ("q-dora", {"parallel": REPLICATE}),
    ("q-twin", {"parallel": REPLICATE}),
    ("q-control", {"parallel": REPLICATE | {"cpu_offload": True}}),
    ("q-lora", {}),
]
QUANTISED = {
    "q-control": {"control": {"num_expanded": 2, "interpolation": "dlerp"}, "quantization": {"kind": "nf4"}},
    "q-lora": {"lora": {"rank": 4}, "quantization": {"kind": "int8"}},
    "q-dora": {"lora": {"rank": 4, "dora": True}, "quantization": {"kind": "int8_torchao"}},
    "q-twin": {"control": {"num_expanded": 2, "twin": "lora"}, "lora": {"rank": 4}, "quantization": {"kind": "float8"}},
}


def of_quantised(world, *args):
    tiny_training.METHODS |= QUANTISED  # of this process
    return cases(world, *args)


def test_shared_is_alone(tiny_base, tmp_path):
    alone = dict.fromkeys(method for method, _ in WAYS)
    for method, found in zip(alone, run(of_quantised, 1, str(tiny_base), str(tmp_path), [(m, {}) for m in alone])[0],
                             strict=True):  # fmt: skip
        alone[method] = found
    for rank in run(of_quantised, 2, str(tiny_base), str(tmp_path), WAYS):
        for found, (method, changes) in zip(rank, WAYS, strict=True):
            want, way = alone[method], f"{method} {changes}"
            assert found["counts"] == want["counts"], way
            np.testing.assert_allclose(found["losses"], want["losses"], atol=1e-5, rtol=1e-5, err_msg=way)
            assert found["gradients"].keys() == want["gradients"].keys() != set()
            for name, gradient in want["gradients"].items():
                np.testing.assert_allclose(found["gradients"][name], gradient, atol=1e-5, rtol=1e-4, err_msg=way)
