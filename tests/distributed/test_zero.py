"""DeepSpeed ZeRO through transformers' Trainer on two processes: the native trainer's losses, checkpoints and weights."""

import json
from pathlib import Path

import pytest
from tiny_training import METHODS, make

from controlllm.train.trained import whole_trained_tensors

pytestmark = pytest.mark.distributed

STEPS = 20
ALONE = {"trainer": "native"}


def zero(stage, *, offload=False, **changes):
    parallel = {"kind": "deepspeed", "zero_stage": stage, "cpu_offload": offload}
    return {"trainer": "transformers", "parallel": parallel} | changes


def trained(world, base, folder, method, **changes):
    """(Losses and norms by step, trained tensors) of a run to its end."""
    trainer = make(world, Path(base), Path(folder), METHODS[method] if isinstance(method, str) else method, **changes)
    trainer.train()
    rows = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    curve = [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
    tensors = {name: t.numpy() for name, t in whole_trained_tensors(trainer.model, keep=True).items()}
    return {"curve": curve, "tensors": tensors, "state": _state_size(trainer.optimizer)}


def _state_size(optimizer):
    """Numbers in this process's optimizer state."""
    state = getattr(optimizer, "optimizer", optimizer).state
    return sum(tensor.numel() for one in state.values() for tensor in one.values() if tensor.ndim)


def each(world, base, folder, cases):
    return [trained(world, base, f"{folder}/{n}", method, **changes) for n, (method, changes) in enumerate(cases)]


LONG = {"steps": STEPS, "lr": 2e-3}
THREE = {"global_batch_size": 5}  # three micro-batches, the last of them empty on one process
ONE = {"global_batch_size": 2}
CASES = [
    ("control", zero(1, **LONG, **ONE), 1e-5),
    ("control", zero(2, **LONG, **THREE, offload=True), 1e-5),
    ("control", zero(3, **LONG, **THREE), 1e-5),
    ("control", zero(3, **LONG, **ONE, offload=True), 1e-5),
    ("lora", zero(2, **LONG, **ONE), 1e-5),
    ("lora", zero(3, **LONG, **THREE, offload=True), 1e-5),
    ("full", zero(1, **LONG, **THREE, offload=True), 1e-5),
    ("full", zero(3, **LONG, **ONE), 1e-5),
]
