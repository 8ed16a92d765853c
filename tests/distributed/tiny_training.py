"""A tiny run of the native trainer, whole in one process or shared by several: what the tests here compare."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from controlllm.config import FSDP, Method, MixConfig, ModelConfig, PackConfig, TrainConfig
from controlllm.data.loader import Mix
from controlllm.train.checkpoint import Checkpoints
from controlllm.train.curves import RunFacts
from controlllm.train.distributed import World
from controlllm.train.model import load_model
from controlllm.train.native import Trainer
from controlllm.train.parallel import parallelize
from controlllm.train.weights import empty_model, fill

CONTROL = {"control": {"num_expanded": 2, "interpolation": "dlerp"}}
METHODS: dict[str, dict[str, Any]] = {
    "control": CONTROL,
    "hybrid": {"control": {"layout": "hybrid", "num_expanded": 2, "divergence": "cosine"}},
    "lora": {"lora": {"rank": 4}},
    "dora": {"lora": {"rank": 4, "dora": True, "rslora": True}},
    "ia3": {"ia3": {}},
    "lora twins": {"control": {"num_expanded": 2, "twin": "lora"}, "lora": {"rank": 4}},
    "dora twins": {
        "control": {"num_expanded": 2, "twin": "lora", "norm_relaxation": "learned"},
        "lora": {"rank": 4, "dora": True},
    },
    "ia3 twins": {"control": {"num_expanded": 2, "twin": "ia3", "interpolation": "dlerp"}, "ia3": {}},
    "prompt": {"prompt": {"num_virtual_tokens": 4}},
    "prefix": {"prompt": {"kind": "prefix", "num_virtual_tokens": 4}},
    "qlora": {"lora": {"rank": 4}, "quantization": {"kind": "nf4"}},
    "q-control": {**CONTROL, "quantization": {"kind": "nf4"}},
    "partial": {"partial": {"num_blocks": 2}},
    "full": {},
}


class Rows:
    """A shelf of one unit, in memory."""

    units, name = 1, "a"

    def __init__(self, count: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.rows = []
        for _ in range(count):
            lengths = rng.integers(3, 20, size=3)
            ids = rng.integers(2, 258, size=lengths.sum())
            row = {"input_ids": ids, "target": rng.random(len(ids)) < 0.6, "lengths": lengths}
            self.rows.append({"rows": np.array([len(self.rows) + 1])} | row)

    def facts(self, unit: int) -> Any:
        return {"unit": {"uri": f"{self.name}.jsonl", "start": 0, "format": "jsonl"}}

    def rows_of(self, unit: int, kind: str = "train") -> int:
        return len(self.rows)

    def read(self, unit: int, row: int, kind: str = "train") -> Any:
        return self.rows[row]

    def tokens_per_row(self) -> float:
        return sum(len(row["input_ids"]) for row in self.rows) / len(self.rows)


def make(world: World, base: Path, folder: Path, method: dict[str, Any], **changes: Any) -> Any:
    settings = {"steps": 3, "lr": 1e-2, "global_batch_size": 4, "precision": "float32", "checkpoint": {"every": 2}}
    config = TrainConfig.model_validate(settings | changes)
    model_config, chosen = ModelConfig(name=str(base)), Method.model_validate(method)
    reads = None
    if isinstance(config.parallel, FSDP) and config.parallel.version == 2:
        model = empty_model(base, model_config, chosen)
        offload = config.parallel.cpu_offload

        def reads(model: Any) -> None:
            fill(model, base, device=world.device, cpu_offload=offload, world=world)
    else:
        model = load_model(base, model_config, chosen)
    parallel = parallelize(model, world, config, fill=reads)
    folder.mkdir(exist_ok=True, parents=True)
    saved = Checkpoints(folder / "checkpoints", config.checkpoint, world=world, identity={"method": str(method)})
    mix = Mix([Rows(10)], MixConfig.model_validate({"datasets": [{"name": "a"}]}), PackConfig())
    run = RunFacts(name="tiny", key="tiny", settings={})
    trainer = Trainer
    if config.trainer == "transformers":
        from controlllm.train.hf import HFTrainer as trainer
    return trainer(parallel, mix, config, folder=folder, checkpoints=saved, run=run, control=chosen.control)


def facts(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Loss, divergence and gradient norm of some steps, and the first one's gradients, clipped."""
    gradients: dict[str, Any] = {}
    apply = trainer.optimizer.step

    def step() -> None:
        for name, p in trainer.model.named_parameters():
            if p.requires_grad and trainer.step == 0:
                gradients[name] = getattr(p.grad, "full_tensor", lambda p=p: p.grad)().numpy().copy()
        apply()

    trainer.optimizer.step = step  # type: ignore[method-assign]
    records = [trainer.train_step()[0] for _ in range(steps)]
    return {
        "losses": [(r.loss, r.cross_entropy, r.divergence or 0.0, r.grad_norm) for r in records],
        "counts": [(r.tokens, r.targets) for r in records],
        "gradients": gradients,
    }


def curves(
    world: World, base: str, folder: str, wanted: list[tuple[str, str, dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """What each (name, method, changes) writes down, step by step, when it is trained to its end."""
    found = {}
    for name, method, changes in wanted:
        place = Path(folder) / name
        trainer = make(world, Path(base), place, METHODS[method], **changes)
        trainer.train()
        assert world.size == 1 or way_of(trainer) == SPREAD[trainer.config.parallel.kind]
        rows = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
        found[name] = [row for row in rows if "loss" in row]
    return found


# A library that cannot do what it was told may do something else, and lose the same.
SPREAD = {"ddp": "DistributedDataParallel", "fsdp": "sharded", "deepspeed": "DeepSpeedEngine"}


def way_of(trainer: Any) -> str:
    parallel = trainer.parallel
    if parallel.is_sharded:
        return "sharded"
    return "plain" if parallel.module is parallel.model else type(parallel.module).__name__


def cases(world: World, base: str, folder: str, wanted: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The facts of each (method, changes)."""
    torch.manual_seed(0)
    return [
        facts(make(world, Path(base), Path(folder) / str(n), METHODS[method], **changes), 3)
        for n, (method, changes) in enumerate(wanted)
    ]
