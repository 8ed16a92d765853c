"""Of a stage's output the few facts that a person looks for, from its lineage and, where it is here, its folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from controlllm.progress import duration

Json = dict[str, Any]
Facts = dict[str, str]


def facts_of(lineage: Json, folder: Path | None, *, dataset: str | None = None) -> Facts:
    """dataset: the facts of one of ingest's sources instead."""
    if dataset is not None:
        return _source(folder, dataset) if folder else {}
    inputs, stage = lineage["inputs"], lineage["stage"]
    settings = {name: inputs.get(name) for name in SETTINGS.get(stage, ())}
    found = {name.rpartition(".")[2].replace("_", " "): _said(v) for name, v in settings.items() if v is not None}
    if folder and (look := LOOKS.get(stage)):
        found |= look(folder)
    return found | {"took": duration(lineage["seconds"])}


def metrics_of(stage: str, folder: Path | None) -> dict[str, float]:
    """The numbers that came out of it."""
    if folder is None:
        return {}
    if stage == "train":
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last: Json = {}
        for row in rows:
            last |= {name: v for name, v in row.items() if name in LAST and v is not None}
        return last
    if stage == "benchmark":
        tasks = _json(folder / "scores.json")["tasks"]
        return {f"{name} {metric}": v for name, t in tasks.items() for metric, v in t["metrics"].items()}
    if stage == "benchmark task":
        return dict(_json(folder / "task.json")["metrics"])
    if stage == "smoke":
        found = _json(folder / "smoke.json")
        return {name: found[name] for name in ("agreement",) if isinstance(found.get(name), int | float)}
    return {}


LAST = ("loss", "validation_loss", "retention_loss", "retention_kl")
SETTINGS = {
    "ingest model": ("model.name", "model.revision"),
    "ingest data": ("mix.decontaminate",),
    "prepare": ("pack.context_length", "pack.strategy", "pack.overlong"),
    "train": (
        "train.trainer", "train.lr", "train.global_batch_size", "train.precision", "train.seed", "control.layout",
        "control.num_expanded", "lora.rank",
    ),
    "benchmark task": ("task.name", "dtype", "backend"),
}  # fmt: skip


def _model(folder: Path) -> Facts:
    config = _json(folder / "config.json")
    found = {"architecture": ", ".join(config.get("architectures") or [])}
    found |= {"layers": str(config["num_hidden_layers"])} if "num_hidden_layers" in config else {}
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return found | {"weights": f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e3:.0f} kB"}


def _data(folder: Path) -> Facts:
    names = {kind: sorted(file.stem for file in (folder / kind).glob("*")) for kind in ("manifests", "probes")}
    return {"datasets": ", ".join(names["manifests"]) or "none", "probes": ", ".join(names["probes"]) or "none"}


def _source(folder: Path, name: str) -> Facts:
    file = folder / "manifests" / f"{name}.json"
    if not file.is_file():
        return {}
    manifest = _json(file)
    files = manifest["files"]
    size = sum(one["stamp"]["size"] for one in files)
    return {"source": str(manifest["source"]), "files": f"{len(files):,}", "bytes": f"{size:,}"}


def _prepared(folder: Path) -> Facts:
    if not (folder / "stats.json").is_file():
        return {"shards": "made while training"}
    stats = _json(folder / "stats.json")
    left = stats["filtered_rows"] + stats["bad_rows"]
    return {
        "rows": f"{stats['rows']:,}, {left:,} left out",
        "tokens": f"{stats['tokens']:,}, {stats['target_tokens']:,} learned",
        "padding": f"{100 * stats['padding']:.2f} %",
    }


def _trained(folder: Path) -> Facts:
    made = _json(folder / "train.json")
    found = {"steps": f"{made['steps']:,}", "tokens": f"{made['tokens']:,}"}
    found |= {"trained": f"{made['trained_parameters']:,} of {made['total_parameters']:,} parameters"}
    return found | {"processes": str(made.get("processes", 1))}


def _scores(folder: Path) -> Facts:
    scores = _json(folder / "scores.json")
    found = {
        f"{name} {metric}": f"{v:.4g}" for name, t in scores["tasks"].items() for metric, v in t["metrics"].items()
    }
    failed = {f"{name} failed": said for name, said in scores["failed"].items()}
    return found | failed


def _task(folder: Path) -> Facts:
    return {metric: f"{value:.4g}" for metric, value in _json(folder / "task.json")["metrics"].items()}


def _smoke(folder: Path) -> Facts:
    made = _json(folder / "smoke.json")
    return {name: _said(made[name]) for name in ("passed", "agreement", "engine") if name in made}


def _report(folder: Path) -> Facts:
    summary = _json(folder / "summary.json")
    found = {"headline": str(summary["headline"])}
    if gate := summary.get("gate"):
        found["gate"] = "passed" if gate["passed"] else str(gate["sentence"])
    return found


LOOKS: dict[str, Callable[[Path], Facts]] = {
    "ingest model": _model,
    "ingest data": _data,
    "prepare": _prepared,
    "train": _trained,
    "consolidate": _model,
    "benchmark": _scores,
    "benchmark task": _task,
    "smoke": _smoke,
    "report": _report,
}


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _json(file: Path) -> Json:
    return json.loads(file.read_text())
