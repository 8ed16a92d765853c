"""Stage 3: packed rows to trained tensors."""

import os
from pathlib import Path
from typing import Any

from controlllm.config import Method, MixConfig, ModelConfig, TrainConfig, ValidationConfig
from controlllm.config.cluster import check_processes
from controlllm.fingerprint import content_of
from controlllm.store import Output, run_stage, stage_inputs
from controlllm.train.distributed import World, processes
from controlllm.train.inputs import Inputs

# How the work is done, and not what comes out of it: a run goes on from its checkpoints when these are changed.
MEANS = {"parallel", "micro_batch_size", "activation_checkpointing", "checkpoint", "guards", "metrics"}

DAY = 86400.0
"""Seconds that processes wait for one that a person debugs."""


def train(
    base: Path,
    shards: Path,
    *,
    model: ModelConfig,
    method: Method,
    mix: MixConfig,
    config: TrainConfig,
    validation: ValidationConfig | None,
) -> Path:
    """`trained.safetensors`, `metrics.jsonl` and `train.json`. Every process of the run calls this.

    The main process looks into the store; the others only join when there is something to train.
    """
    check_processes(int(os.environ.get("WORLD_SIZE", "1")))
    inputs = Inputs(base, shards, model, method, mix, config, validation)
    patience = DAY if debug_rank() is not None else 2 * config.guards.hang_seconds
    with processes(timeout_seconds=patience) as world:
        if world.is_main:
            return world.share(_on_main(inputs, world).path)
        if (joined := world.share(None)) is not None:
            _fit(inputs, world, joined)
        return world.share(None)


def debug_rank() -> int | None:
    """The process that stops in pdb, if one is wanted."""
    rank = os.environ.get("CONTROLLLM_DEBUG_RANK")
    return None if rank is None else int(rank)


def _on_main(inputs: Inputs, world: World) -> Output:
    parents = {"ingest model": inputs.base, "prepare": inputs.shards}
    config = _settings(inputs)

    def build(folder: Path) -> None:
        facts = stage_inputs("train", config=config, parents=parents)
        identity = {name: v for name, v in facts.items() if not name.startswith(("code ", "version of "))}
        _fit(inputs, world, world.share((folder, content_of(facts), identity)))

    output = run_stage("train", config=config, parents=parents, build=build, resumable=True)
    if output.cached:
        world.share(None)
    return output


def _fit(inputs: Inputs, world: World, run: tuple[Path, str, dict[str, Any]]) -> None:
    from controlllm.train.fit import fit  # seconds, which a run from the cache does without

    fit(inputs, world, *run, debug_rank=debug_rank())


def _settings(inputs: Inputs) -> dict[str, Any]:
    """Only what can change the result."""
    mix, config = inputs.mix, inputs.config
    return {
        "model": inputs.model.model_dump(include={"dtype", "attention"}),
        **inputs.method.model_dump(),
        "mix": {
            **mix.model_dump(include={"seed", "temperature", "order"}),
            "shares": {d.name: [d.weight, d.epochs] for d in mix.datasets},
        },
        "train": config.model_dump(exclude=MEANS | ({"profile"} if config.profile is None else set())),
        "validation": inputs.validation,
    }
