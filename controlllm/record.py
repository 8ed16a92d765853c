"""What a run left behind, read again: its numbers, its settings, and the lineage of every stage."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controlllm.errors import UserError
from controlllm.store import LINEAGE, find_lineage, store_root

FILE = "record.json"
MODELS = ("refused", "model")
"""Links of a run's folder: the model that its gate stopped, the one that is promoted."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A run; of a checkpoint that lies by itself only the checkpoint."""

    checkpoint: Path | None = None
    """The folder with config.json and the weights."""
    folder: Path | None = None
    """Of the run: where the report lies."""
    summary: Json = field(default_factory=dict)
    """The report's numbers, {} where nothing was measured."""
    config: Json = field(default_factory=dict)
    """The recipe with all defaults, as a tree."""
    stages: dict[str, Json] = field(default_factory=dict)
    """The lineages that are still there, in the order in which stages ran: `train`, `benchmark of the base`, ..."""
    made: dict[str, Json] = field(default_factory=dict)
    """Small JSON files that stages left: `prepare/stats.json`, `train/train.json`, `manifests/<dataset>.json`."""

    @property
    def name(self) -> str:
        return self.summary.get("name") or (self.checkpoint.name if self.checkpoint else "run")

    @property
    def tasks(self) -> dict[str, Json]:
        """What was measured, before and after, by task."""
        return self.summary.get("comparison", {}).get("tasks", {})

    @property
    def results(self) -> dict[str, str]:
        """The content of every stage's output; that of single tasks is part of their benchmark's."""
        return {name: made["content"] for name, made in self.stages.items() if made["stage"] != "benchmark task"}

    @property
    def model_config(self) -> Json:
        """The checkpoint's config.json, {} without a checkpoint."""
        return _json(self.checkpoint / "config.json") if self.checkpoint else {}

    def to_json(self) -> Json:
        return {"summary": self.summary, "config": self.config, "stages": self.stages, "made": self.made}


def open_record(target: Path) -> Record:
    """Of runs/<name>, its model, its summary.json, a checkpoint's folder, or a folder with a record.json.

    Raises UserError for anything else.
    """
    if (target / FILE).is_file():
        return Record(folder=target, **_json(target / FILE))
    if target.name == "summary.json" and target.is_file():
        target = target.parent
    run = _run_of(target)
    if run is None:
        if (target / "config.json").is_file():
            return Record(checkpoint=target, stages=_stages(target))
        raise UserError(f"{target}: is neither a run (runs/<name> with its report) nor a checkpoint with a config.json")
    summary = run / "summary" if (run / "summary").is_dir() else run
    lineage = find_lineage(summary)
    if lineage is None:
        raise UserError(f"{summary}: has no {LINEAGE}; build the report again (controlllm report RECIPE)")
    checkpoint = _checkpoint(run, target, lineage)
    stages = _stages(*([checkpoint] if checkpoint else []), summary)
    config = nested({n.removeprefix("run."): v for n, v in lineage["inputs"].items() if n.startswith("run.")})
    return Record(checkpoint, run, _json(summary / "summary.json"), config, stages, _made(stages, summary))


def nested(flat: Mapping[str, Any]) -> Any:
    """The tree whose values stand under dotted names; the reverse of how the store writes a stage's inputs."""
    tree: Json = {}
    for name, value in flat.items():
        *above, last = name.split(".")
        place = tree
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
    return _with_lists(tree)


def _with_lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    below = {key: _with_lists(value) for key, value in tree.items()}
    if below and list(below) == [str(number) for number in range(len(below))]:
        return list(below.values())
    return below


def _run_of(target: Path) -> Path | None:
    """The run's folder for itself, for its model and for its summary."""
    for place in (target, target.parent if target.name in (*MODELS, "summary") else target):
        if (place / "summary" / "summary.json").is_file():
            return place
    return target if (target / "summary.json").is_file() else None


def _checkpoint(run: Path, target: Path, report: Json) -> Path | None:
    """The one that is named, or the one that the report is about: an earlier model stays when a gate stops the next."""
    places = [target] if target.name in MODELS else [run / name for name in MODELS]
    found = next((place for place in places if (place / "config.json").is_file()), None)
    trained = ((find_lineage(found) or {}).get("parents", {}).get("train") if found else None) or {}
    told = report["parents"].get("train", {})
    if found and trained and told and trained["content"] != told["content"]:
        raise UserError(
            f"{found}: is not the model of the report beside it; give the model's own folder, {found.resolve()}"
        )
    return found


def _stages(*ends: Path) -> dict[str, Json]:
    """Lineages of these folders and of all that they were made from, as far as the store still has them."""
    found: dict[str, Json] = {}
    for end in ends:
        if lineage := find_lineage(end):
            stores = (end.resolve().parent.parent, store_root())
            found |= dict(_before(lineage, stores)) | {lineage["stage"]: lineage}
    return {name: {key: v for key, v in lineage.items() if key != "ancestors"} for name, lineage in found.items()}


def _before(lineage: Json, stores: tuple[Path, ...]) -> Iterator[tuple[str, Json]]:
    for label, parent in lineage["parents"].items():
        folders = (store / parent["stage"].replace(" ", "-") / parent["key"] for store in stores)
        made = next((found for folder in folders if (found := find_lineage(folder))), None)
        if made and made["content"] == parent["content"]:
            yield from _before(made, stores)
            yield (label if label.startswith(parent["stage"]) else parent["stage"]), made


def _made(stages: dict[str, Json], summary: Path) -> dict[str, Json]:
    """Facts that are small enough to keep. Of a manifest only its files' names, sizes and versions."""
    found: dict[str, Json] = {}
    stores = (summary.resolve().parent.parent, store_root())
    for stage, lineage in stages.items():
        places = (store / lineage["stage"].replace(" ", "-") / lineage["key"] for store in stores)
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            continue
        for name in ("stats.json", "train.json"):
            if (folder / name).is_file():
                found[f"{stage}/{name}"] = _json(folder / name)
        for file in sorted(folder.glob("manifests/*.json")):
            listed = {Path(f["uri"]).name: f["stamp"] for f in _json(file)["files"]}
            found[f"manifests/{file.name}"] = {"files": listed}
    return found


def _json(file: Path) -> Json:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; run the stage that makes it again") from None
    except ValueError as error:
        raise UserError(f"{file}: is not valid JSON ({error}); run the stage that makes it again") from None
