"""Runs of ours, finished or not, where their trained tensors lie and what they were to be."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlllm.config import Method
from controlllm.consolidate.dcp import read_safetensors_dcp
from controlllm.control.tensor_files import Source, read_header
from controlllm.errors import UserError
from controlllm.output import content_hash, find_lineage, find_output, store_root
from controlllm.progress import console
from controlllm.record import nested
from controlllm.train.checkpoint_files import MANIFEST, Damaged, Manifest, step_name, step_numbers, verify

TRAINED = "trained.safetensors"


@dataclass(frozen=True)
class Run:
    """What a run trained."""

    place: Path
    """The file, or the folder of shards."""
    tensors: dict[str, Source]
    inputs: dict[str, Any]
    """Of the training stage, by name."""
    facts: dict[str, Any]
    """For the lineage."""

    @property
    def method(self) -> Method:
        tree = nested({name: value for name, value in self.inputs.items() if name.split(".")[0] in Method.model_fields})
        return Method.model_validate(tree)

    def base(self, given: Path | None) -> Path:
        """The base model's folder. UserError where none is given and the store has none."""
        content = self.inputs.get("output of ingest model")
        if given is not None:
            if content_hash(given) != content:
                said = "is not the very folder that the run began with; what fits in name and shape is taken from it"
                console.print(f"[yellow]![/] --base: {given} {said}")
            return given
        if content and (found := find_output("ingest model", content, near=self.place)):
            return found
        raise UserError(f"{self.place}: its base model is not in {store_root()}; name its folder with --base")


def find_run(folder: Path) -> Run | None:
    """Of a run's output folder, the training's, its checkpoints' or one of these; None for any other folder.

    Of several checkpoints the newest whole one. UserError where none is whole.
    """
    if (folder / MANIFEST).is_file() and step_numbers([folder.name]):
        return _of_step(folder)
    if (folder / TRAINED).is_file() and (lineage := find_lineage(folder)):
        facts = {"key": lineage["key"], "content": lineage["content"]}
        return Run(folder / TRAINED, dict(read_header(folder / TRAINED)), lineage["inputs"], facts)
    if lineage := find_lineage(folder / "summary"):
        trained = store_root() / "train" / lineage["parents"]["train"]["key"]
        if not trained.is_dir():
            raise UserError(f"{folder}: what its training gave is no longer in {store_root()}; run the recipe again")
        return find_run(trained)
    for place in (folder, folder / "checkpoints"):
        if place.is_dir() and (steps := step_numbers(entry.name for entry in place.iterdir())):
            return _newest(place, steps)
    return None


def _newest(folder: Path, steps: list[int]) -> Run:
    for step in reversed(steps):
        try:
            return _of_step(folder / step_name(step))
        except UserError as error:
            console.print(f"[yellow]![/] {error}: passed over")
    raise UserError(f"{folder}: none of its {len(steps)} checkpoints is whole")


def _of_step(folder: Path) -> Run:
    try:
        manifest = Manifest.parse((folder / MANIFEST).read_bytes(), step=step_numbers([folder.name])[0])
        verify(folder, manifest)
    except (Damaged, OSError) as damage:
        raise UserError(f"{folder}: {damage}: half a checkpoint; choose another, or copy it again") from None
    found = read_safetensors_dcp(folder, lambda name: name.startswith("model."))
    facts = {"checkpoint": folder.name, "step": manifest.step}
    return Run(folder, {name.removeprefix("model."): t for name, t in found.items()}, manifest.identity, facts)
