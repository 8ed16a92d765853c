"""Bytes on the wire of a training step and process, counted, against what the trained share must move.

python bench/wire_bytes.py [--processes 2] [--hidden 128]

Every collective of a real step (forward, backward, clipping, sums, metrics) is seen on its way to the process group
and counted as a ring algorithm sends it, of n processes each: an all-gather of N bytes and a reduce-scatter of N bytes
(n - 1)/n · N, an all-reduce twice that. What must be moved of P trained weights: they are gathered in bfloat16 for the
forward pass and again for the backward pass (once with reshard_after_forward: false), for each micro-batch; gradients
are reduced in float32, once: (n - 1)/n · P · (2 · gathers + 4) bytes. Bar: 1.02 times that, frozen weights replicated.

A Llama with Llama-3-8B's proportions, scaled down: 32 blocks, vocabulary 31.3 × hidden, untied head; E = 8. As bytes
grow with hidden², the last column is Llama-3-8B's, in GB, for many processes ((n - 1)/n = 1). The design's 7.0 against
48.2 GB are 4 bytes for each trained weight against 6 of all: one gather, and gradients reduced in bfloat16.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from launch import in_processes
from random_training import NEVER, RandomRows, random_model, trainer_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from controlllm.config import Method, ModelConfig, TrainConfig
from controlllm.train.distributed import World, processes
from controlllm.train.native import Trainer

CONTROL, FULL = Method.model_validate({"control": {"num_expanded": 8}}), Method()
REPLICATED, SHARDED = {"frozen": "replicate"}, {"frozen": "shard"}
# Name: method, parallelism, micro-batches, gathers of a trained weight per micro-batch
CASES: dict[str, tuple[Method, dict[str, Any], int, int]] = {
    "E = 8, frozen replicated": (CONTROL, REPLICATED, 1, 2),
    "the same, accumulated 4": (CONTROL, REPLICATED, 4, 2),
    "the same, kept after forward": (CONTROL, REPLICATED | {"reshard_after_forward": False}, 1, 1),
    "E = 8, frozen sharded": (CONTROL, SHARDED, 1, 2),
    "full fine-tuning": (FULL, SHARDED, 1, 2),
}
BAR, LLAMA3_8B = 1.02, 4096
KINDS = ("gathered", "reduced", "other")
# Collective: what for, times the ring's (n - 1)/n, argument with all bytes. FSDP2's own are the first two.
COST = {
    "_allgather_base_": ("gathered", 1, 0), "_reduce_scatter_base_": ("reduced", 1, 1), "allreduce_": ("other", 2, 0),
    "allgather_": ("other", 1, 0), "all_gather_into_tensor": ("other", 1, 0), "all_reduce": ("other", 2, 0),
}  # fmt: skip


def main() -> None:
    options = parse()
    if options.child:
        with processes(timeout_seconds=300) as world:
            print(json.dumps([measured(name, options, world) for name in CASES]))
        return
    found: list[dict[str, float]] = in_processes(options.processes, "--child")[0]
    print(f"Llama, 32 blocks of {options.hidden}, {options.processes} processes; bytes per step and process")
    print(f"{'':30}{'gathered':>14}{'reduced':>14}{'other':>8}{'must':>14}{'ratio':>7}{'8B, GB':>8}")
    for name, row in zip(CASES, found, strict=True):
        total = sum(row[kind] for kind in KINDS)
        large = total / row["share"] * (LLAMA3_8B / options.hidden) ** 2 / 1e9
        columns = f"{row['gathered']:14,.0f}{row['reduced']:14,.0f}{row['other']:8,.0f}{row['must']:14,.0f}"
        print(f"{name:30}{columns}{total / row['must']:7.3f}{large:8.1f}")
    once, accumulated, kept = found[:3]
    for name, row in (("reshard_after_forward", once), ("kept after forward", kept)):
        print(f"ratio, frozen replicated, {name}: {sum(row[k] for k in KINDS) / row['must']:.4f} (bar {BAR})")
    print(f"ratio of reduced bytes, 4 micro-batches to 1: {accumulated['reduced'] / once['reduced']:.4f} (bar 1)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128, help="a multiple of 32; Llama-3-8B has 4096")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    hidden = options.hidden  # Llama-3-8B: 4096, 14336, 128256, 32 heads, 8 of keys and values
    sizes = {"layers": 32, "intermediate": hidden * 7 // 2, "vocabulary": hidden * 128256 // 4096, "tokens": 64}
    vars(options).update(sizes | {"heads": 8, "kv_heads": 2})
    return options


def measured(name: str, options: argparse.Namespace, world: World) -> dict[str, float]:
    method, parallel, micro_batches, gathers = CASES[name]
    config = TrainConfig.model_validate({
        "steps": 3, "global_batch_size": micro_batches * world.size, "precision": "bf16", "checkpoint": NEVER,
        "parallel": {"kind": "fsdp"} | parallel,
    })  # fmt: skip
    torch.manual_seed(0)
    model = random_model(options, ModelConfig(name="random", dtype="bfloat16"), method, torch.device("cpu"))
    rows = RandomRows(3 * config.global_batch_size, options.tokens, vocabulary=options.vocabulary, document=32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, rows.mix(), config, method, world=world, folder=Path(folder))
        trained = sum(p.numel() for p in trainer.trained)
        with trainer._surroundings(None) as show:
            step(trainer, show)  # what is made once
            with Wire(world.size) as wire:
                step(trainer, show)
    share = (world.size - 1) / world.size
    return wire.bytes | {"must": share * trained * (2 * gathers * micro_batches + 4), "share": share}


def step(trainer: Trainer, show: Any) -> None:
    record, _ = trainer.train_step()
    show(record)


class Wire(TorchDispatchMode):
    """Bytes that one process sends, by what for, of all collectives while it is entered."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.bytes: dict[str, float] = dict.fromkeys(KINDS, 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in ("wait_tensor", "_wrap_tensor_autograd"):
            return
        kind, times, place = COST[name]
        tensors = [leaf for leaf in tree_leaves(args[place]) if isinstance(leaf, torch.Tensor)]
        whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if name == "all_gather_into_tensor":  # whose argument is one process's part
            whole *= self.size
        self.bytes[kind] += times * (self.size - 1) / self.size * whole


if __name__ == "__main__":
    main()
