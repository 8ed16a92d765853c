"""What a path that a person gives stands for: a model's folder, a run, a training checkpoint, an adapter."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlllm.config import Method
from controlllm.consolidate.own import Run, find_run
from controlllm.errors import UserError
from controlllm.output import find_output
from controlllm.progress import console
from controlllm.whole import read_object

Json = dict[str, Any]
ADAPTER = "adapter_config.json"
RUN = ("model", "refused")
"""Links of a run's folder, the promoted model first."""


@dataclass(frozen=True)
class Model:
    """A Hugging Face folder with everything that loads by itself, or with its `adapter/`."""

    folder: Path

    @property
    def config(self) -> Json:
        return read_object(self.folder / "config.json")


@dataclass(frozen=True)
class Trained:
    """What training changes, and what that is a change of."""

    folder: Path
    """A checkpoint of a step; or the file with the trained tensors of a training that has ended."""
    base: Path
    method: Method
    dtype: str
    """Of the frozen weights while training."""
    seed: int
    step: int | None
    """None for a training that has ended."""


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder and the model it belongs to."""

    folder: Path
    base: Path


Place = Model | Trained | Adapter


def find_place(target: Path, base: Path | None) -> Place:
    """base: by `--base`, where the base model is that a training checkpoint or an adapter needs.

    UserError for what does not exist, is of no known kind, or is not all there.
    """
    if not target.is_dir():
        what = "is a file; give the checkpoint's folder" if target.exists() else f"no such folder{_nearest(target)}"
        raise UserError(f"{target}: {what}")
    if (target / "config.json").is_file():
        return Model(target)
    if (target / ADAPTER).is_file():
        return Adapter(target, base or _base_of_adapter(target))
    for name in RUN:
        if (target / name / "config.json").is_file():
            if name != RUN[0]:
                console.print(f"  {target}: its gate refused the newest model; this is it", markup=False)
            return Model(target / name)
    if (run := find_run(target)) is not None:
        return _trained(run, base)
    raise UserError(
        f"{target}: is no checkpoint; give a model's folder (config.json), a run (runs/NAME), a training checkpoint "
        f"(step-00000040, or the folder that holds them) or an adapter's folder ({ADAPTER})"
    )


def _trained(run: Run, base: Path | None) -> Trained:
    dtype, seed = run.inputs.get("model.dtype", "float32"), run.inputs.get("train.seed", 0)
    return Trained(run.place, run.base(base), run.method, dtype, seed, run.facts.get("step"))


def _base_of_adapter(folder: Path) -> Path:
    """The tuned model around it where that takes the adapter; else the base by lineage or by its own words."""
    parent = folder.resolve().parent
    lineage = read_object(parent / "config.json").get("lineage") or {} if (parent / "config.json").is_file() else {}
    content, named = lineage.get("base_content"), read_object(folder / ADAPTER).get("base_model_name_or_path")
    if content and (found := find_output("ingest model", content, near=parent)):
        return found
    if named and (Path(named) / "config.json").is_file():
        return Path(named)
    raise UserError(f"{folder}: is an adapter, and its base model ({named}) is not here; give its folder with --base")


def _nearest(target: Path) -> str:
    names = list(_folders(target.parent))
    near = difflib.get_close_matches(target.name, names, n=1)
    return f"; did you mean {target.parent / near[0]}?" if near else ""


def _folders(folder: Path) -> Iterator[str]:
    if folder.is_dir():
        yield from (entry.name for entry in folder.iterdir() if entry.is_dir())
