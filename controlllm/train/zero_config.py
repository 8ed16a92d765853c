"""DeepSpeed's settings, made from a recipe's, or a file of the user's own held against it. Imports no torch."""

import importlib.util
import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from controlllm.config import DeepSpeed, RunConfig, TrainConfig
from controlllm.errors import UserError

BUCKET = 50_000_000
"""Numbers that are gathered or reduced at once (200 MB in float32)."""
KEEP_WHOLE = 100_000
"""Parameters with fewer numbers stay gathered under stage 3: alphas, norms, biases."""
# What the recipe decides: key of DeepSpeed's, by which setting.
DECIDED = {
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "gradient_clipping": "train.optimizer.max_grad_norm",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "torch_autocast.enabled": "train.precision",
    "zero_allow_untested_optimizer": "train.optimizer",
    "zero_force_ds_cpu_optimizer": "train.optimizer",
    "zero_optimization.stage": "train.parallel.zero_stage",
    "zero_optimization.offload_optimizer.device": "train.parallel.cpu_offload",
    "zero_optimization.offload_param.device": "train.parallel.cpu_offload",
    "zero_optimization.zero_hpz_partition_size": "train.parallel.hpz",
    "zero_optimization.zero_quantized_weights": "train.parallel.qwz",
    "zero_optimization.zero_quantized_gradients": "train.parallel.qgz",
}
BY_PROCESSES = ("gradient_accumulation_steps", "train_batch_size")
# What stages 1 and 2 do not have.
OFF: dict[str, Any] = {
    "zero_optimization.offload_param.device": "none",
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.zero_quantized_weights": False,
    "zero_optimization.zero_quantized_gradients": False,
}
SECTIONS = {"optimizer": "train.optimizer", "scheduler": "train.schedule", "data_types": "train.precision"}


def zero_config(config: TrainConfig, *, processes: int, nodes_of: int | None = None) -> dict[str, Any]:
    """DeepSpeed's JSON for `config.parallel` of kind deepspeed. nodes_of: processes on each node, where it is known.

    Precision is not in it: float32 parameters are computed upon under torch's autocast, inside the model, as in every
    other way of sharing. UserError where settings, file and processes do not fit together.
    """
    parallel = config.parallel
    assert isinstance(parallel, DeepSpeed)
    if mistake := _unfit(config):
        raise UserError(mistake)
    _check_processes(parallel, processes, nodes_of)
    made = _made(config, parallel, processes)
    return made if parallel.config is None else _own(parallel.config, made)


def zero_mistake(config: RunConfig) -> str | None:
    """`key: why DeepSpeed cannot train this, and the way out`, or None; what does not depend on the processes."""
    parallel = config.train.parallel
    if not isinstance(parallel, DeepSpeed):
        return None
    if importlib.util.find_spec("deepspeed") is None:
        return (
            "train.parallel.kind: deepspeed is not installed; pip install 'controlllm[deepspeed]', or use "
            "parallel: {kind: fsdp}"
        )
    if parallel.qwz and config.control:
        return (
            "train.parallel.qwz: quantises parameters in groups of 8 numbers, and the alphas of the section control "
            "have fewer; leave it out"
        )
    mistake = _unfit(config.train)
    if mistake is None and parallel.config is not None:
        _own(parallel.config, _made(config.train, parallel, 1), unknown=BY_PROCESSES)
    return mistake


def _unfit(config: TrainConfig) -> str | None:
    with_it = "does not go with train.parallel.kind deepspeed"
    if config.optimizer.name != "adamw":
        return f"train.optimizer.name: {config.optimizer.name} {with_it}, which shards another state; use adamw"
    if config.precision not in ("bf16", "fp16", "float32"):
        return (
            f"train.precision: {config.precision} {with_it}, which keeps float32 masters; use bf16, fp16 or float32, "
            "or parallel: {kind: fsdp}"
        )
    assert isinstance(config.parallel, DeepSpeed)
    if config.parallel.zero_stage == 3 and config.compile != "none":
        return (
            f"train.compile: {config.compile} does not go with zero_stage 3, whose hooks gather parameters inside the "
            "blocks; use zero_stage 2, or none"
        )
    if config.parallel.zero_stage == 3 and config.activation_checkpointing == "selective":
        return (
            "train.activation_checkpointing: selective does not go with zero_stage 3, which gathers parameters again "
            "where it recomputes; use full, or zero_stage 2"
        )
    if config.parallel.hpz == 1:
        return "train.parallel.hpz: 1 shares the second copy with nobody; give a node's GPUs, or leave it out"
    return None


def _check_processes(parallel: DeepSpeed, processes: int, nodes_of: int | None) -> None:
    if parallel.hpz and (processes % parallel.hpz or processes == parallel.hpz):
        raise UserError(
            f"train.parallel.hpz {parallel.hpz} must divide the {processes} processes into two groups or more; "
            "give a node's GPUs, or leave it out on one node"
        )
    if parallel.qgz and nodes_of is not None and (processes % nodes_of or processes == nodes_of):
        raise UserError(
            f"train.parallel.qgz reduces between nodes: it needs two or more of equal size, found {processes} "
            f"processes, {nodes_of} on this node; leave it out"
        )


def _made(config: TrainConfig, parallel: DeepSpeed, processes: int) -> dict[str, Any]:
    rounds = math.ceil(math.ceil(config.global_batch_size / processes) / config.micro_batch_size)
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": rounds,
        # DeepSpeed wants the product, even where the last micro-batches of a step have fewer rows or none.
        "train_batch_size": config.micro_batch_size * rounds * processes,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        # The kernels of qgz read float16, whatever they are given.
        "communication_data_type": "fp16" if parallel.qgz else "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "zero_optimization": _zero(config, parallel),
    }


def _zero(config: TrainConfig, parallel: DeepSpeed) -> dict[str, Any]:
    offload = {"device": "cpu" if parallel.cpu_offload else "none", "pin_memory": parallel.cpu_offload}
    zero = {
        "stage": parallel.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET,
        "offload_optimizer": offload,
    }
    if parallel.zero_stage < 3:
        return zero | {"allgather_partitions": True, "allgather_bucket_size": BUCKET}
    return zero | {
        "offload_param": dict(offload),
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": KEEP_WHOLE,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        # Under autocast a plain linear layer keeps a 16-bit copy of its gathered weight for the backward pass.
        "memory_efficient_linear": config.precision != "float32",
        "zero_hpz_partition_size": parallel.hpz or 1,
        "zero_quantized_weights": parallel.qwz,
        "zero_quantized_gradients": parallel.qgz,
    }


def _own(file: str, made: dict[str, Any], *, unknown: Collection[str] = ()) -> dict[str, Any]:
    """The file's; what it leaves out or calls auto is the recipe's, where that decides. unknown: keys not compared."""
    own = _load(file)
    for name, setting in SECTIONS.items():
        if name in own:
            raise UserError(f"train.parallel.config: {file} has a section {name}, but {setting} says it; leave it out")
    ours = OFF | dict(_leaves(made))
    found = dict(_leaves(own))
    for key, value in found.items():
        if value == "auto":
            if key not in ours:
                raise UserError(f"train.parallel.config: {file}: {key} is auto, but no setting of the recipe says it")
            found[key] = ours[key]
        elif key in DECIDED and key not in unknown and value != ours[key]:
            raise UserError(
                f"train.parallel.config: {file} says {key} {json.dumps(value)}, but by {DECIDED[key]} it is "
                f"{json.dumps(ours[key])}; write auto there, or change the recipe"
            )
    decided = {key: value for key, value in _leaves(made) if key in DECIDED or "." not in key}
    return _tree(decided | found)


def _load(file: str) -> dict[str, Any]:
    try:
        own = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"train.parallel.config: {file} cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"train.parallel.config: {file} is no JSON ({error})") from None
    if not isinstance(own, dict):
        raise UserError(f"train.parallel.config: {file} holds no JSON object")
    return own


def _leaves(tree: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is no object."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _tree(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in leaves.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree
