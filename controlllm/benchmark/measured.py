"""A checkpoint measured by itself, without a recipe: its results in a folder of its own, with a table."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from controlllm.benchmark.stage import benchmark, refuse_failed
from controlllm.benchmark.tasks import probes_of
from controlllm.config import BenchmarkConfig, PackConfig
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.store import content_hash

HOME = Path("runs/benchmarks")


def is_checkpoint(target: str) -> bool:
    """Whether this is a model's folder, and not a recipe."""
    return (Path(target) / "config.json").is_file()


def results_folder(checkpoint: Path) -> Path:
    """Where the results of a checkpoint are, wherever it was moved: named by what it holds."""
    place = checkpoint.absolute()
    name = place.parent.name if place.name in ("model", "refused") else place.name  # a run's link: the run's name
    return HOME / f"{name}-{content_hash(checkpoint.resolve())[:8]}"


def measure(checkpoint: Path, config: BenchmarkConfig, *, to: Path | None = None) -> Path:
    """Score a checkpoint; returns the folder with scores.json, items/ and results.json.

    Tasks that the folder has from before stay in it, unless they are measured again.
    """
    folder, checkpoint = to or results_folder(checkpoint), checkpoint.resolve()
    _check(folder)
    data = None
    if probes := probes_of(config):
        if "drift" in probes:
            raise UserError("benchmark: drift is measured from a base model's answers; give a recipe, or leave it out")
        from controlllm.ingest import ingest_data

        data = ingest_data(checkpoint, None, config, PackConfig()).path
    made = benchmark(checkpoint, data, config).path
    scores = _merge(made, folder)
    console.print(_table(scores, folder.name))
    console.print(f"{folder / 'scores.json'}\nnext: controlllm compare BASE {folder}", markup=False)
    refuse_failed(made)
    return folder


def _check(folder: Path) -> None:
    """Before anything is measured: that its results can be put there."""
    there = next(place for place in (folder / "items", folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{folder}: {there} is a file; give another folder with --to")
    if not os.access(there, os.W_OK):
        raise UserError(f"{folder}: {there} cannot be written; give another folder with --to")


def _merge(made: Path, folder: Path) -> dict[str, Any]:
    """Put results into a folder; other tasks of the same checkpoint stay."""
    scores = json.loads((made / "scores.json").read_text())
    try:
        (folder / "items").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; give another folder with --to") from None
    results = json.loads((made / "results.json").read_text())
    if (file := folder / "scores.json").is_file():
        before = json.loads(file.read_text())
        if before["checkpoint"] != scores["checkpoint"]:
            raise UserError(f"{folder}: holds the results of another checkpoint; give another folder with --to")
        scores["tasks"] = before["tasks"] | scores["tasks"]
        earlier = json.loads((folder / "results.json").read_text())
        results = {k: earlier.get(k, {}) | v if isinstance(v, dict) else v for k, v in results.items()}
    for source in (made / "items").iterdir():
        shutil.copyfile(source, folder / "items" / source.name)
    for name, value in (("results.json", results), ("scores.json", scores)):
        fresh = folder / f".{name}"
        fresh.write_text(json.dumps(value, indent=1))
        fresh.replace(folder / name)
    return scores


def _table(scores: dict[str, Any], name: str) -> Any:
    """A row per task, with the standard error of a share."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("suite", "task", title=escape(name), title_justify="left", show_edge=False)
    for column in ("items", "score", "±", "loss"):
        table.add_column(column, justify="right")
    for task, found in sorted(scores["tasks"].items(), key=lambda item: (item[1]["suite"], item[0])):
        first, value = next(iter(found["metrics"].items()))
        share = "" if first == "loss" else f"{100 * value:.1f} %"
        spread = "" if first == "loss" else f"{100 * (value * (1 - value) / found['items']) ** 0.5:.1f}"
        loss = found["metrics"].get("loss")
        cells = (f"{found['items']:,}", share, spread, "" if loss is None else f"{loss:.3f}")
        table.add_row(escape(found["suite"]), escape(f"{found['title']} ({task})"), *cells)
    for task in scores["failed"]:
        table.add_row("", escape(task), "", "failed")
    return table
