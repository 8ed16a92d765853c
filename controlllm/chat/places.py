"""What a path that a person gives stands for: a model's folder, a run, a training checkpoint, an adapter."""

import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlllm.config import Method
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.record import nested
from controlllm.store import find_lineage, store_root

Json = dict[str, Any]
WEIGHTS = "trained.safetensors"
ADAPTER = "adapter_config.json"
RUN = ("model", "refused")
"""Links of a run's folder, the promoted model first."""


@dataclass(frozen=True)
class Model:
    """A Hugging Face folder with everything that loads by itself, or with its `adapter/`."""

    folder: Path

    @property
    def config(self) -> Json:
        return read_json(self.folder / "config.json")


@dataclass(frozen=True)
class Trained:
    """What training changes, and what that is a change of."""

    folder: Path
    """A checkpoint of a step, or the training stage's output."""
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
    if (target / WEIGHTS).is_file() and (lineage := find_lineage(target)):
        return _trained(target, lineage["inputs"], base, step=None)
    if (step := _newest_step(target)) is not None:
        return step_of(step, base)
    raise UserError(
        f"{target}: is no checkpoint; give a model's folder (config.json), a run (runs/NAME), a training checkpoint "
        f"(step-00000040, or the folder that holds them) or an adapter's folder ({ADAPTER})"
    )


def step_of(folder: Path, base: Path | None) -> Trained:
    """A verified checkpoint of a step. UserError where it is not what was written."""
    from controlllm.train.checkpoint_files import Damaged, LocalStore, step_numbers, verify

    steps = step_numbers([folder.name])
    if not steps:
        raise UserError(f"{folder}: a checkpoint's folder is named by its step, as in step-00000040; rename it back")
    try:
        manifest = LocalStore(folder.parent).manifest(steps[0])
        verify(folder, manifest)
    except Damaged as damage:
        raise UserError(f"{folder}: {damage}; give another step, or the folder that holds them") from None
    return _trained(folder, manifest.identity, base, step=manifest.step)


def stored_model(content: str, *, near: Path) -> Path | None:
    """The base model with this content, in the store or in the one that `near` lies in."""
    stores = dict.fromkeys((store_root(), *near.resolve().parents))
    for store in stores:
        for folder in sorted((store / "ingest-model").glob("[!.]*")):
            if (lineage := find_lineage(folder)) and lineage["content"] == content:
                return folder
    return None


def read_json(file: Path) -> Json:
    """UserError for a file that is missing or holds no object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy the checkpoint again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: must hold an object, found {type(values).__name__}; copy the checkpoint again")
    return values


def _newest_step(folder: Path) -> Path | None:
    """A checkpoint's own folder; of a folder of them, or of a training's, the newest that is there and whole."""
    from controlllm.train.checkpoint_files import MANIFEST, Damaged, LocalStore, step_name, step_numbers, verify

    if (folder / MANIFEST).is_file() and not step_numbers(os.listdir(folder)):
        return folder
    for root in (folder, folder / "checkpoints"):
        steps = step_numbers(os.listdir(root)) if root.is_dir() else []
        store = LocalStore(root)
        for step in reversed(steps):
            try:
                verify(store.place(step), store.manifest(step))
            except Damaged as damage:
                console.print(f"[yellow]![/] {store.place(step)} is passed over: {damage}")
            else:
                return root / step_name(step)
        if steps:
            raise UserError(f"{root}: none of its {len(steps)} checkpoints is whole; train on, or give another folder")
    return None


def _trained(folder: Path, identity: Json, base: Path | None, *, step: int | None) -> Trained:
    """identity: the training's inputs, by dotted names."""
    known = Method.model_fields
    settings = nested({name: value for name, value in identity.items() if name.split(".")[0] in known})
    method = Method.model_validate(settings)
    content = identity.get("output of ingest model")
    if base is not None:
        _note_another_base(folder, base, content)
    elif not content or (base := stored_model(content, near=folder)) is None:
        raise UserError(f"{folder}: the base model that it was trained from is not in the store; give it with --base")
    dtype, seed = identity.get("model.dtype", "float32"), identity.get("train.seed", 0)
    return Trained(folder, base, method, dtype, seed, step)


def _note_another_base(folder: Path, base: Path, content: str | None) -> None:
    from controlllm.store import content_hash

    if content and content_hash(base) != content:
        console.print(
            f"[yellow]![/] {base} is not, file by file, the base that {folder.name} was trained from", highlight=False
        )


def _base_of_adapter(folder: Path) -> Path:
    """The tuned model around it where that takes the adapter; else the base by lineage or by its own words."""
    parent = folder.resolve().parent
    lineage = read_json(parent / "config.json").get("lineage") or {} if (parent / "config.json").is_file() else {}
    content, named = lineage.get("base_content"), read_json(folder / ADAPTER).get("base_model_name_or_path")
    if content and (found := stored_model(content, near=parent)):
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
