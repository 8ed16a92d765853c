"""One run of the experiment: a real training run, looked at every few steps, and dialled when it is done.

python bench/forgetting/one_run.py RUN_AS_JSON RESULT_FILE
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from experiment import Json, Run
from torch import Tensor

from controlllm.config import RetentionConfig, RunConfig, ValidationConfig, load_config
from controlllm.control.expand import control_blocks
from controlllm.data.loader import Mix
from controlllm.data.streaming import open_shelves, pack_of
from controlllm.ingest import ingest_data, ingest_model
from controlllm.prepare import prepare
from controlllm.train.checkpoint import Checkpoints
from controlllm.train.curves import RunFacts
from controlllm.train.distributed import World
from controlllm.train.model import load_model
from controlllm.train.native import Trainer
from controlllm.train.parallel import Parallel, parallelize
from controlllm.train.precision import autocast
from controlllm.train.retention import Retention, retention_rows
from controlllm.train.validate import Validation


@dataclass(frozen=True)
class Inputs:
    """Of all runs of the experiment."""

    base: Path
    shards: Path
    config: RunConfig


def inputs_of(run: Run) -> Inputs:
    """The stages before the training, from the store where they were made before."""
    probes = ", ".join(run.old)
    config = load_config(
        run.recipe, f"benchmark.old=[{probes}]", f"validation.retention.probes=[{probes}]", *run.settings,
    )  # fmt: skip
    base = ingest_model(config.model).path
    data = ingest_data(base, config.mix, config.benchmark, config.pack).path
    return Inputs(base, prepare(base, data, config.mix, config.pack, config.validation).path, config)


def result_of(run: Run) -> Json:
    """Settings, points and seconds."""
    inputs, began = inputs_of(run), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(inputs, run, Path(folder))
        start = {name: p.detach().clone() for name, p in learned(trainer).items()}
        points, seconds = trained(trainer, run.looks)
        points += dialled(trainer, start, run.dial)
    parameters = sum(p.numel() for p in start.values())
    return asdict(run) | {
        "recipe": Path(run.recipe).name, "points": points, "trained_parameters": parameters, "tokens": trainer.tokens,
        "seconds": {"all": round(time.monotonic() - began, 1), "training": round(seconds, 1)},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }  # fmt: skip


def trainer_of(inputs: Inputs, run: Run, folder: Path) -> Trainer:
    """As the training stage makes it, but for what is looked at and that nothing is saved."""
    world, config = World(), inputs.config
    torch.manual_seed(config.train.seed)
    parallel = parallelize(
        load_model(inputs.base, config.model, config.method, seed=config.train.seed), world, config.train
    )
    mix = Mix(open_shelves(inputs.shards, config.mix, growing=folder), config.mix, pack_of(inputs.shards))
    return Trainer(
        parallel, mix, config.train, folder=folder, control=config.control,
        checkpoints=Checkpoints(folder / "checkpoints", config.train.checkpoint, world=world, identity={}),
        run=RunFacts(name="bench", key="bench", settings={}),
        validation=partial(validation_of, inputs, run, parallel, mix, world),
    )  # fmt: skip


def validation_of(inputs: Inputs, run: Run, parallel: Parallel, mix: Mix, world: World) -> Validation:
    """Held-out puzzles and, each by itself, the old skills."""
    from transformers import AutoTokenizer

    config: ValidationConfig = inputs.config.validation  # type: ignore[assignment] - inputs_of sets one
    made = Validation(
        parallel, parallel.model, config, rows=mix.validation(config.rows), world=world,
        autocast=partial(autocast, inputs.config.train, world.device),
        micro_batch_size=inputs.config.train.micro_batch_size,
    )  # fmt: skip
    tokenizer, length = AutoTokenizer.from_pretrained(inputs.base), pack_of(inputs.shards).context_length
    parts = {}
    for name, items in run.old.items():
        rows = retention_rows(inputs.shards, RetentionConfig(probes=[name], items=items), tokenizer, length)
        parts[name] = Retention(made.passes, rows, positions=run.positions)
    made.retention = ByProbe(parts)  # type: ignore[assignment] - it is used as one
    return made


class ByProbe:
    """The retention of several probes, each by itself."""

    def __init__(self, parts: dict[str, Retention]):
        self.parts = parts

    @property
    def rounds(self) -> int:
        return sum(part.rounds for part in self.parts.values())

    def run(self) -> dict[str, Any]:
        """{old: {probe: loss}, kl: {probe: KL(base || model)}}, nats per token."""
        found = {name: part.run() for name, part in self.parts.items()}
        return {
            short: {name: each[f"retention_{long}"] for name, each in found.items()}
            for short, long in (("old", "loss"), ("kl", "kl"))
        }


def trained(trainer: Trainer, looks: list[int]) -> tuple[list[Json], float]:
    """The points of the way, the base first, and the seconds of all steps."""
    points, seconds = [point(trainer)], 0.0
    while not trainer.finished:
        record, _ = trainer.train_step()
        seconds += record.seconds
        if trainer.step in looks:
            points.append(point(trainer))
    return points, seconds


def dialled(trainer: Trainer, start: dict[str, Tensor], scales: list[float]) -> list[Json]:
    """Points between base and trained model: of a concat model by alpha_scale, of any other on the straight line
    between the weights before and after (Wortsman et al. 2022), so that nobody has a dial that others have not."""
    control, points = getattr(trainer.model.config, "control", None), []
    concat = bool(control) and control["layout"] == "concat"
    trainer.optimizer.state.clear()  # as large as the weights, twice
    now = learned(trainer)
    end = {} if concat else {name: p.detach().clone() for name, p in now.items()}
    for scale in scales:
        for block in control_blocks(trainer.model) if concat else ():
            block.alpha_scale = scale
        for name, weights in end.items():
            now[name].data.copy_(torch.lerp(start[name], weights, scale))
        points.append(point(trainer, scale=scale))
    return points


def learned(trainer: Trainer) -> dict[str, Tensor]:
    """What is trained, by name."""
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


def point(trainer: Trainer, *, scale: float = 1.0) -> Json:
    """{step, scale, new, old, kl}: losses in nats per target."""
    assert trainer.validation
    found: Any = trainer.validation.run()
    rounded = {side: {name: round(v, 5) for name, v in found[side].items()} for side in ("old", "kl")}
    return {"step": trainer.step, "scale": scale, "new": round(found["validation_loss"], 5)} | rounded


if __name__ == "__main__":
    made, file = result_of(Run(**json.loads(sys.argv[1]))), Path(sys.argv[2])
    file.with_suffix(".new").write_text(json.dumps(made) + "\n")
    os.replace(file.with_suffix(".new"), file)
