"""One training run, from the folders of the stages before to `trained.safetensors`: puts the parts together."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from controlllm.config import FSDP, TrainConfig, ValidationConfig
from controlllm.data.loader import Mix
from controlllm.data.streaming import is_plan, open_shelves, pack_of, shards_being_made
from controlllm.errors import UserError
from controlllm.fingerprint import sync
from controlllm.train.announce import announce
from controlllm.train.attention import refuse_missing
from controlllm.train.checkpoint import Checkpoints
from controlllm.train.curves import RunFacts
from controlllm.train.distributed import World
from controlllm.train.environment import environment
from controlllm.train.guards import out_of_memory
from controlllm.train.inputs import Inputs
from controlllm.train.model import load_model
from controlllm.train.native import Trainer
from controlllm.train.parallel import Parallel, parallelize
from controlllm.train.precision import autocast
from controlllm.train.quantize import weight_count
from controlllm.train.retention import retention_rows
from controlllm.train.run import TrainingRun
from controlllm.train.trained import numel, whole_trained_tensors
from controlllm.train.validate import Validation
from controlllm.train.weights import empty_model, fill
from controlllm.train.zero import check_start

SUMMARY = "train.json"
"""Written last: with it the run is finished."""


def fit(
    inputs: Inputs, world: World, folder: Path, key: str, identity: dict[str, Any], *, debug_rank: int | None = None
) -> None:
    """Every process calls this. key: of the run, for trackers; identity: what its checkpoints are told apart by."""
    torch.manual_seed(inputs.config.seed)
    name = "-".join([*(dataset.name for dataset in inputs.mix.datasets), key[:8]])
    run = RunFacts(name=name, key=key, settings=identity)
    try:
        with _data(inputs, world, folder) as mix:
            if not world.share((folder / SUMMARY).exists()):  # else it was killed after that
                _fit(inputs, world, folder, mix, run, debug_rank)
    except (RuntimeError, MemoryError) as error:
        length = pack_of(inputs.shards).context_length
        explained = out_of_memory(error, inputs.config, context_length=length, device=world.device)
        raise explained or error from error
    if world.is_main:
        for name in ("checkpoints", "checkpoints-local"):
            shutil.rmtree(folder / name, ignore_errors=True)  # the finished run needs them no more
    world.barrier()


def _fit(inputs: Inputs, world: World, folder: Path, mix: Mix, run: RunFacts, debug_rank: int | None) -> None:
    config = inputs.config
    parallel = _parallel(inputs, world)
    place = config.checkpoint.folder or _shared(run.key) or folder / "checkpoints"
    if world.is_main:
        announce(parallel.model, inputs, world, folder, place)
    checkpoints = Checkpoints(
        place, config.checkpoint, world=world, identity=run.settings, scratch=folder / "checkpoints-local"
    )
    validation = partial(_validation, inputs.validation, inputs, world, mix, parallel) if inputs.validation else None
    trainer = _trainer(config)(
        parallel, mix, config, folder=folder, checkpoints=checkpoints, run=run, control=inputs.method.control,
        validation=validation,
    )  # fmt: skip
    trainer.train(debug=debug_rank)
    tensors = whole_trained_tensors(parallel.model, keep=world.is_main)
    if world.is_main:
        save_file(tensors, folder / "trained.safetensors")
        sync(folder / "trained.safetensors")
        _write_whole(folder / SUMMARY, json.dumps(_summary(parallel.model, folder, trainer), indent=1))


def _shared(key: str) -> str | None:
    """This run's folder where a cluster profile keeps checkpoints: found again by every try, on any machine."""
    root = os.environ.get("CONTROLLLM_CHECKPOINTS")
    return f"{root.rstrip('/')}/{key}" if root else None


def _parallel(inputs: Inputs, world: World) -> Parallel:
    """The model, spread over the processes, with its weights in place."""
    config, sharding = inputs.config, inputs.config.parallel
    refuse_missing(inputs.model.attention, world.device)
    check_start(config, world)
    read = None
    if isinstance(sharding, FSDP) and sharding.version == 2:
        model = empty_model(inputs.base, inputs.model, inputs.method, seed=config.seed)
        read = partial(fill, base=inputs.base, device=world.device, cpu_offload=sharding.cpu_offload, world=world)
    else:
        model = load_model(inputs.base, inputs.model, inputs.method, seed=config.seed)
    return parallelize(model, world, config, fill=read)


def _trainer(config: TrainConfig) -> type[TrainingRun]:
    if config.trainer == "native":
        return Trainer

    from controlllm.train.hf import HFTrainer

    return HFTrainer


def _validation(config: ValidationConfig, inputs: Inputs, world: World, mix: Mix, parallel: Parallel) -> Validation:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs.base) if config.generate or config.retention else None
    retention = []
    if config.retention:
        length = pack_of(inputs.shards).context_length
        retention = retention_rows(inputs.shards, config.retention, tokenizer, length)
    return Validation(
        parallel, parallel.model, config, rows=mix.validation(config.rows), world=world,
        autocast=partial(autocast, inputs.config, world.device), micro_batch_size=inputs.config.micro_batch_size,
        tokenizer=tokenizer, retention=retention,
    )  # fmt: skip


@contextmanager
def _data(inputs: Inputs, world: World, folder: Path) -> Iterator[Mix]:
    """The mix, whose shards the main process has made beside the training when there is only a plan of them yet."""
    shards, mix, growing = inputs.shards, inputs.mix, folder / "data"
    with shards_being_made(shards, inputs.base, mix, growing=growing) if world.is_main else nullcontext():
        world.barrier()  # what an earlier try left is out of the way
        if is_plan(shards) and not growing.exists():
            raise UserError(
                f"pack.streaming: {growing}, where the main process makes the shards, is not there for process "
                f"{world.rank}; set CONTROLLLM_CACHE to a folder that all nodes share, or pack.streaming to false"
            )
        yield Mix(open_shelves(shards, mix, growing=growing), mix, pack_of(shards))
    world.barrier()
    if world.is_main and is_plan(shards):
        for name in ("stats.json", "quarantine.jsonl"):
            shutil.move(growing / name, folder / name)
        shutil.rmtree(growing)


def _write_whole(file: Path, text: str) -> None:
    """Never half of it, even if the power fails."""
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_text(text)
    sync(fresh)
    fresh.replace(file)
    sync(file.parent)


def _summary(model: Any, folder: Path, trainer: TrainingRun) -> dict[str, Any]:
    steps = [row for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]
    return {
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "target_tokens": sum(row["targets"] for row in steps),
        "seconds": round(sum(row["seconds"] for row in steps), 1),
        "processes": trainer.world.size,
        "resumed": trainer.resumed,
        "environment": environment(trainer.world.device),
        "trained_parameters": sum(numel(p) for p in model.parameters() if p.requires_grad),
        "total_parameters": weight_count(model),
        "sites": (getattr(model.config, "control", None) or {}).get("sites", []),
        "control": getattr(model.config, "control", None),
    }
