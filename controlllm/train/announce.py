"""What a person wants to know when training begins: what is trained, by whom, how far, in how much memory."""

from pathlib import Path
from typing import Any

from controlllm.config import FSDP, PackConfig, RunConfig
from controlllm.control.expand import settings_of
from controlllm.data.streaming import pack_of
from controlllm.memory import Machine, peak, predict
from controlllm.model_shape import model_shape
from controlllm.progress import console
from controlllm.train.distributed import World
from controlllm.train.inputs import Inputs
from controlllm.train.quantize import weight_count
from controlllm.train.trained import numel

GIGABYTE = 10**9


def announce(model: Any, inputs: Inputs, world: World, folder: Path, place: Path | str) -> None:
    """Two lines. place: of the checkpoints. The main process calls this."""
    config, pack = inputs.config, pack_of(inputs.shards)
    trained = sum(numel(p) for p in model.parameters() if p.requires_grad)
    total = weight_count(model)
    facts = (
        f"{short(trained)} of {short(total)} parameters trained ({_what(model, inputs)})",
        _processes(inputs, world),
        config.precision,
        *_needs(inputs, pack, world),
    )
    console.print("  " + " · ".join(facts), markup=False)
    length = f"{config.steps:,} steps" if config.steps else f"{config.tokens:,} tokens in steps"
    where = " and" if place == folder / "checkpoints" else f" in {place},"
    often = "step" if config.checkpoint.every == 1 else f"{config.checkpoint.every:,} steps"
    plan = (
        f"{length} of at most {config.global_batch_size} × {pack.context_length:,} tokens",
        f"checkpoints every {often}{where} metrics.jsonl in {folder}",
    )
    console.print("  " + " · ".join(plan), markup=False)


def short(count: int) -> str:
    """`135 M`, `8.03 B`; small numbers as they are."""
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{float(f'{count / size:.3g}'):g} {letter}"
    return f"{count:,}"


def _what(model: Any, inputs: Inputs) -> str:
    method, settings = inputs.method, settings_of(model)
    if settings:
        blocks, adapters = ", ".join(map(str, settings.sites)), method.adapters
        kind = f" of {adapters}" if adapters else ""
        return f"{len(settings.sites)} twins{kind}, {settings.layout}, at blocks {blocks}"
    if adapters := method.adapters:
        return adapters
    if method.prompt:
        return f"{method.prompt.num_virtual_tokens} virtual tokens, {method.prompt.kind}"
    if method.partial:
        return f"{method.partial.num_blocks} of the model's own blocks"
    return "the whole model"


def _processes(inputs: Inputs, world: World) -> str:
    parallel = inputs.config.parallel
    if world.size == 1 and not isinstance(parallel, FSDP):
        return f"1 process on {world.device.type}"
    way: str = parallel.kind
    if isinstance(parallel, FSDP):
        replicas, shards = parallel.sizes(world.size)
        way = f"{replicas} × {shards} shards" if replicas > 1 else f"{shards} shards"
        way += ", frozen ones whole" if parallel.frozen == "replicate" else ""
    return f"{world.size} processes on {world.device.type}, {way}"


def _needs(inputs: Inputs, pack: PackConfig, world: World) -> list[str]:
    """The predicted memory; nothing for a model whose memory is not predicted."""
    device = "cuda" if world.device.type == "cuda" else "cpu"
    shape = model_shape(str(inputs.base))
    if shape is None or shape.decoder is None:
        return []
    method = dict(inputs.method)
    config = RunConfig(name="run", model=inputs.model, pack=pack, mix=inputs.mix, train=inputs.config, **method)
    memory = predict(shape, config, processes=world.size, device=device)
    return [f"about {peak(memory, Machine(device, 1, None)) / GIGABYTE:.2g} GB each"]
