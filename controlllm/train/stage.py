"""Stage 3: packed rows to trained tensors."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from controlllm.config import ControlConfig, MixConfig, ModelConfig, TrainConfig, ValidationConfig
from controlllm.errors import UserError
from controlllm.store import Output, run_stage
from controlllm.train.distributed import World, processes


def train(
    base: Path,
    shards: Path,
    *,
    model: ModelConfig,
    control: ControlConfig | None,
    mix: MixConfig,
    config: TrainConfig,
    validation: ValidationConfig | None,
) -> Path:
    """`trained.safetensors`, `metrics.jsonl` and `train.json`. Every process of the run calls this.

    The main process looks into the store; the others only join when there is something to train.
    """

    def work(folder: Path, world: World) -> None:
        _train(folder, world, base, shards, model=model, control=control, mix=mix, config=config, validation=validation)

    with processes() as world:
        if not world.is_main:
            if (folder := world.share(None)) is not None:
                work(folder, world)
            return world.share(None)
        output = _on_main(work, world, base, shards, _inputs(model, control, mix, config, validation))
        return world.share(output.path)


def _on_main(work: Any, world: World, base: Path, shards: Path, inputs: dict[str, Any]) -> Output:
    def build(folder: Path) -> None:
        work(world.share(folder), world)

    parents = {"ingest model": base, "prepare": shards}
    output = run_stage("train", config=inputs | {"processes": world.size}, parents=parents, build=build, resumable=True)
    if output.cached:
        world.share(None)
    return output


def _inputs(
    model: ModelConfig, control: ControlConfig | None, mix: MixConfig, config: TrainConfig, validation: Any
) -> dict[str, Any]:
    """Only what can change the result: how often a checkpoint is saved cannot."""
    return {
        "model": model.model_dump(include={"dtype", "attention"}),
        "control": control,
        "mix": {
            **mix.model_dump(include={"seed", "temperature", "order"}),
            "shares": {d.name: [d.weight, d.epochs] for d in mix.datasets},
        },
        "train": config.model_dump(exclude={"checkpoint", "profile"}),
        "validation": validation,
    }


def _train(
    folder: Path,
    world: World,
    base: Path,
    shards: Path,
    *,
    model: ModelConfig,
    control: ControlConfig | None,
    mix: MixConfig,
    config: TrainConfig,
    validation: ValidationConfig | None,
) -> None:
    import torch
    from safetensors.torch import save_file

    from controlllm.train.checkpoint import trained_tensors
    from controlllm.train.model import load_model
    from controlllm.train.native import Trainer

    torch.manual_seed(config.seed)
    loaded = load_model(base, model, control)
    with _data(folder, world, base, shards, mix) as rows:
        trainer = Trainer(loaded, rows, config, world=world, folder=folder, control=control)
        trainer.train(validation)
    if world.is_main:
        tensors = {name: tensor.contiguous().cpu() for name, tensor in trained_tensors(loaded).items()}
        save_file(tensors, folder / "trained.safetensors")
        (folder / "train.json").write_text(json.dumps(_summary(loaded, folder, config), indent=1))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the finished run needs them no more
    world.barrier()


@contextmanager
def _data(folder: Path, world: World, base: Path, shards: Path, mix: MixConfig) -> Iterator[Any]:
    """The mix, whose shards the main process has made beside the training when there is only a plan of them yet."""
    from controlllm.data.loader import Mix
    from controlllm.data.streaming import is_plan, open_shelves, pack_of, shards_being_made

    growing = folder / "data"
    with shards_being_made(shards, base, mix, growing=growing) if world.is_main else nullcontext():
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


def _summary(model: Any, folder: Path, config: TrainConfig) -> dict[str, Any]:
    steps = [row for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]
    return {
        "steps": config.steps,
        "tokens": sum(row["tokens"] for row in steps),
        "target_tokens": sum(row["targets"] for row in steps),
        "seconds": round(sum(row["seconds"] for row in steps), 1),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "sites": (getattr(model.config, "control", None) or {}).get("sites", []),
        "control": getattr(model.config, "control", None),
    }
