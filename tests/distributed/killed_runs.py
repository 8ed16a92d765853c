"""Whole runs of the training stage in processes of their own, which can be killed (SIGKILL) at a chosen point."""

import importlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run
from safetensors.torch import load_file

from controlllm.config import (
    BenchmarkConfig,
    Method,
    MixConfig,
    ModelConfig,
    PackConfig,
    TrainConfig,
    ValidationConfig,
)  # fmt: skip
from controlllm.train.distributed import World
from controlllm.train.inputs import Inputs
from controlllm.train.share import Share
from controlllm.train.watchdog import Watchdog

METHODS: dict[str, dict[str, Any]] = {
    "control": {"control": {"num_expanded": 2, "interpolation": "dlerp"}},
    "hybrid": {"control": {"layout": "hybrid", "num_expanded": 2, "divergence": "cosine"}},
    "lora": {"lora": {"rank": 4, "dropout": 0.2}},
    "dora": {"lora": {"rank": 4, "dora": True}},
    "ia3": {"ia3": {}},
    "dora twins": {"control": {"num_expanded": 2, "twin": "lora"}, "lora": {"rank": 4, "dora": True, "dropout": 0.2}},
    "partial": {"partial": {"num_blocks": 2}},
    "full": {},
}
TRAIN = {
    "steps": 10, "lr": 1e-2, "global_batch_size": 4, "precision": "float32", "checkpoint": {"every": 2, "keep": 1},
    "schedule": {"warmup_steps": 3}, "optimizer": {"weight_decay": 0.1},
}  # fmt: skip
WATCHED = {"every": 2, "rows": 2, "best": {}, "retention": {"probes": ["prose"], "items": 2, "positions": 16}}
WALL = {"seconds", "tokens_per_second", "tflops", "mfu", "data_seconds", "memory_gb"}
"""What a line of metrics says about the machine and not about the run."""


@dataclass(frozen=True)
class Kill:
    """Where all processes are killed, at the same time, by the first one that comes there."""

    at: str
    """A phase of the loop, or the dotted name of a function."""
    step: int | None = None
    """Of the phase; one behind the last step at the end."""
    call: int = 1
    """Which of the calls: of a phase, in this step; of a function, in this process."""
    after: bool = False
    """Once the function is done, instead of before it."""


def inputs_of(base: Path, shards: Path, method: str = "control", *, watched: Any = None, **changes: Any) -> Inputs:
    """A recipe's sections; `changes` are of `train`."""
    return Inputs(
        base, shards, ModelConfig(name=str(base)), Method.model_validate(METHODS[method]), mix(),
        TrainConfig.model_validate(TRAIN | changes), ValidationConfig.model_validate(watched) if watched else None,
    )  # fmt: skip


def mix() -> MixConfig:
    return MixConfig.model_validate({"datasets": [{"name": "puzzles", "rows": 40, "seed": 1, "dedup": True}]})


def pack(base: Path) -> Path:
    """About eleven packed rows and a few that are held back, in the stage store: a run of ten steps sees all thrice."""
    from controlllm.ingest import ingest_data
    from controlllm.prepare import prepare

    packing = PackConfig.model_validate({"context_length": 256, "validation_fraction": 0.1, "overlong": "drop"})
    measured = BenchmarkConfig(new=[], old=["prose"], items=2)
    data = ingest_data(base, mix(), measured, packing).path
    return prepare(base, data, mix(), packing, ValidationConfig.model_validate(WATCHED)).path


def train(inputs: Inputs, folder: Path, *, size: int = 1, kill: Kill | None = None, root: Path | None = None) -> None:
    """In `size` new processes; returns when they are done, or were killed where they should be.

    root: where a cluster profile keeps checkpoints, if it is not `folder`.
    """
    if kill is None:
        run(_train, size, inputs, str(folder), None, root)
        return
    with pytest.raises(RuntimeError, match="the process is gone"):
        run(_train, size, inputs, str(folder), kill, root)


def _train(world: World, inputs: Inputs, folder: str, kill: Kill | None, root: Path | None) -> None:
    from controlllm.train.fit import fit

    if root:
        os.environ["CONTROLLLM_CHECKPOINTS"] = str(root)
    torch.set_num_threads(1)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    _note_rows(path, world)
    if kill:
        _arm(kill, world.gather(os.getpid()))
    fit(inputs, world, path, "key", {"run": 1})


def _note_rows(folder: Path, world: World) -> None:
    """Write down which rows of which shard every step was made of, at once, so that it outlives a kill."""
    plain = Share.of

    def noted(self: Share, step: int) -> Any:
        rows = [list(self.mix.place(place)) for places in self.places(step) for place in places]
        with (folder / f"rows-{world.rank}.jsonl").open("a") as file:
            file.write(json.dumps([step + 1, rows]) + "\n")
        return plain(self, step)

    Share.of = noted


def _arm(kill: Kill, everyone: list[int]) -> None:
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == kill.call:
            for process in sorted(everyone, key=lambda process: process == os.getpid()):
                os.kill(process, signal.SIGKILL)

    owner, name = _place(kill.at) if "." in kill.at else (Watchdog, "phase")
    plain: Callable[..., Any] = getattr(owner, name)

    def armed(*args: Any, **kwargs: Any) -> Any:
        wanted = "." in kill.at or args[1:] == (kill.at, kill.step)
        if wanted and not kill.after:
            count()
        result = plain(*args, **kwargs)
        if wanted and kill.after:
            count()
        return result

    setattr(owner, name, armed)


def _place(dotted: str) -> tuple[Any, str]:
    """Of a function in a module, or in a class of one."""
    path, _, name = dotted.rpartition(".")
    module, _, last = path.rpartition(".")
    if last[0].isupper():
        return getattr(importlib.import_module(module), last), name
    return importlib.import_module(path), name


def lines(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of the run itself."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{name: value for name, value in row.items() if name not in WALL} for row in rows]


def rows_of_steps(folder: Path) -> dict[int, list[tuple[int, ...]]]:
    """(dataset, unit, row) of each step, of all processes together."""
    steps: dict[int, list[tuple[int, ...]]] = {}
    for file in folder.glob("rows-*.jsonl"):
        for line in file.read_text().splitlines():
            step, rows = json.loads(line)
            steps.setdefault(step, []).extend(map(tuple, rows))
    return {step: sorted(rows) for step, rows in sorted(steps.items())}


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "trained.safetensors")


def same_to_the_bit(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def killed_and_gone_on(inputs: Inputs, folder: Path, reference: Path, kills: list[Kill], *, size: int = 1) -> None:
    """Kill a run at all these points, one after the other, and let it finish: it must be the reference, to the bit."""
    want, order = lines(reference), rows_of_steps(reference)
    saving = inputs.config.checkpoint
    reached = -1
    for kill in [*kills, None]:
        for file in folder.glob("rows-*.jsonl"):
            file.unlink()
        train(inputs, folder, size=size, kill=kill)
        written, made = lines(folder), rows_of_steps(folder)
        assert written == want[: len(written)], kill
        for step, rows in made.items():  # a process may be killed before it has read its own
            assert rows == order[step] or (step == max(made) and set(rows) < set(order[step])), (kill, step)
        if made and reached >= 0:  # one interval is lost, and what was done while it was being written
            assert min(made) > reached - saving.every * (2 if saving.asynchronous else 1), kill
        reached = max([row["step"] for row in written], default=reached)
    assert lines(folder) == want
    same_to_the_bit(trained(folder), trained(reference))
    assert not list(folder.glob("checkpoints*"))


def with_train(inputs: Inputs, **changes: Any) -> Inputs:
    """Other settings of `train` for the same data."""
    return replace(inputs, config=TrainConfig.model_validate(inputs.config.model_dump() | changes))
