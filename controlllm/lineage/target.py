"""What a person names: a run, a stage's folder, a model, or a report."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controlllm.errors import UserError
from controlllm.output import find_lineage

Json = dict[str, Any]
RUNS = Path("runs")
LINKS = {"summary": "report", "model": "model", "refused": "model that the gate stopped"}
"""Of a run's folder, with what they are of it; the report's own parents hold the rest."""


@dataclass(frozen=True)
class Target:
    """Where to begin."""

    folder: Path
    title: str
    kind: str = "output"
    """output, run, or model for a checkpoint that carries only its config.json."""
    lineage: Json | None = None
    """Of an output."""
    parts: dict[str, Path] = field(default_factory=dict)
    """Of a run: folders of outputs, by role."""
    recorded: dict[str, Json] = field(default_factory=dict)
    """Of a checkpoint: stage, key and content of what it was made from, by role."""
    facts: Json = field(default_factory=dict)


def open_target(path: Path) -> Target:
    """UserError where there is nothing whose lineage is known."""
    folder = place_of(path)
    if (lineage := find_lineage(folder)) is not None:
        stage = lineage.get("stage")
        if not isinstance(stage, str) or not isinstance(lineage.get("parents"), dict):
            raise UserError(f"{folder / 'lineage.json'}: is no lineage of a controlllm stage; give the stage's folder")
        return Target(folder, stage, lineage=lineage)
    parts = {role: folder / link for link, role in LINKS.items() if find_lineage(folder / link) is not None}
    if parts:
        return Target(folder, folder.resolve().name, "run", parts=parts)
    about = _config_lineage(folder)
    if about:
        return Target(folder, folder.resolve().name, "model", recorded=_recorded(about), facts=_plain(about))
    raise UserError(
        f"{path}: is neither a run, a stage's folder, a model nor a report with a lineage; "
        "give runs/<name>, its model or report.html, or a folder of the store (controlllm cache ls)"
    )


def place_of(path: Path) -> Path:
    """A folder itself, that of a file, or that of a run by its name. UserError where there is none."""
    for place in (path, RUNS / path):
        if place.is_dir():
            return place
        if place.is_file():
            return place.parent
    raise UserError(f"{path}: no such run, folder or file; a run's name is that of its folder in {RUNS}/")


def _config_lineage(folder: Path) -> Json:
    """What consolidating wrote into the checkpoint itself."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: is not valid JSON ({error}); copy the model again") from None
    return (found.get("lineage") if isinstance(found, dict) else None) or {}


def _recorded(about: Json) -> dict[str, Json]:
    training = about.get("training")
    return {"train": {"stage": "train", **training}} if isinstance(training, dict) and "key" in training else {}


def _plain(about: Json) -> Json:
    data, code = about.get("data", {}), about.get("code", {})
    found = {"base model": about.get("base_model"), "base content": about.get("base_content")}
    found |= {"data": ", ".join(data.get("datasets", [])), "data content": data.get("content")}
    found |= {"controlllm": code.get("controlllm"), "code": code.get("train")}
    return {name: value for name, value in found.items() if value}
