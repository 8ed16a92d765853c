"""From the folders of the stages to the facts of a report, and from there to its two files."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from controlllm.errors import UserError
from controlllm.private import clean
from controlllm.report.facts import cost, data_facts, environment
from controlllm.report.read import read_json, read_lines
from controlllm.store import read_lineage

Json = dict[str, Any]


@dataclass(frozen=True)
class StageTime:
    """One stage of the run, in stage order."""

    stage: str
    seconds: float
    cached: bool
    key: str
    finished: str


def build_report(
    folder: Path,
    *,
    name: str,
    method: str,
    base_scores: Path,
    tuned_scores: Path,
    train: Path,
    prepare: Path,
    smoke: Path | None,
    contrasts: Mapping[str, Path],
    stages: Sequence[StageTime],
    config: Mapping[str, Any],
    dial: Path | None = None,
    probe: Path | None = None,
    memory: int | None = None,
) -> None:
    """Write folder/report.html and folder/summary.json.

    A contrast is a folder with another run's summary.json; only what both runs measured alike is drawn side by side.
    dial, probe: folders with dial.json and probe.json. memory: bytes that a process of the training was to need.
    """
    made = _made(train=train, prepare=prepare, base_scores=base_scores, tuned_scores=tuned_scores, smoke=smoke)
    lineage = {what: read_lineage(path) for what, path in made.items()}
    facts = read_json(train / "train.json")
    metrics = read_lines(train / "metrics.jsonl")
    source = train if (train / "stats.json").exists() else prepare
    times = [asdict(stage) for stage in stages]
    comparison = _compare(base_scores, tuned_scores, config["benchmark"]["margin"])
    summary: Json = {
        "name": name,
        "method": method,
        "base": clean(config["model"]["name"]),
        "headline": comparison["overall"]["sentence"],
    }
    summary |= {"comparison": comparison, "gate": _gate(comparison, config["benchmark"].get("gate")), "train": facts}
    summary |= {"data": data_facts(read_json(source / "stats.json"), config["mix"], source / "quarantine.jsonl")}
    summary |= {"cost": cost(metrics, facts, times, memory), "stages": times}
    summary |= {"environment": environment(facts, lineage), "config": clean(_plain(config))}
    summary |= {"lineage": {what: _origin(one) for what, one in lineage.items()}}
    page = _page(
        summary, metrics, lineage, contrasts, base_scores=base_scores, tuned_scores=tuned_scores,
        smoke=smoke, dial=dial, probe=probe,
    )  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False))
    (folder / "report.html").write_text(page, encoding="utf-8", errors="replace")


def _page(
    summary: Json,
    metrics: list[Json],
    lineage: Json,
    contrasts: Mapping[str, Path],
    *,
    base_scores: Path,
    tuned_scores: Path,
    smoke: Path | None,
    dial: Path | None,
    probe: Path | None,
) -> str:
    # Altair and numpy, which a run from the cache does without.
    from controlllm.charts import training_figures
    from controlllm.report.answers import answers
    from controlllm.report.dial import dial_facts
    from controlllm.report.drawings import drawings
    from controlllm.report.forest import panels
    from controlllm.report.page import render

    runs = [summary, *(_contrast(run, path, summary) for run, path in contrasts.items())]
    return render(
        run=summary,
        runs=runs,
        panels=panels(runs),
        answers=answers(base_scores, tuned_scores, summary["comparison"]["tasks"]),
        curves=training_figures(metrics, summary["train"].get("resumed", ())),
        dial=dial_facts(dial / "dial.json") if dial else None,
        probe=drawings(probe / "probe.json") if probe else [],
        smoke=clean(read_json(smoke / "smoke.json")) if smoke else None,
        lineage={what: one | {"inputs": clean(one["inputs"])} for what, one in lineage.items()},
    )


def _made(**folders: Path | None) -> dict[str, Path]:
    titles = {"prepare": "data", "train": "training", "base_scores": "benchmark of the base"}
    titles |= {"tuned_scores": "benchmark of the tuned", "smoke": "smoke test"}
    return {title: folder for name, title in titles.items() if (folder := folders[name])}


def _compare(base_scores: Path, tuned_scores: Path, margin: float) -> Json:
    from controlllm.statistics import compare_scores

    return compare_scores(base_scores, tuned_scores, margin=margin)


def _gate(comparison: Json, limits: Mapping[str, float] | None) -> Json | None:
    """None for a recipe without a gate."""
    from controlllm.gate import breaches

    if not limits:
        return None
    found = [breach.message for breach in breaches(comparison, limits)]
    return {"limits": dict(limits), "passed": not found, "failed": found, "sentence": "; ".join(found)}


def _contrast(name: str, folder: Path, summary: Json) -> Json:
    """Another run's summary, less the tasks that it measured otherwise: on other items or from another base model."""
    if name == summary["name"]:
        raise UserError(f"report.contrast: {name} is this run itself; leave it out")
    other: Json = read_json(folder / "summary.json")
    other["name"] = name
    if "comparison" not in other:
        raise UserError(f"report.contrast: the summary of {name} is of an earlier version; run that recipe again")
    mine, theirs = summary["comparison"], other["comparison"]
    alike = {key: task for key, task in theirs["tasks"].items() if _alike(task, mine["tasks"].get(key))}
    suites = {
        key: suite
        for key, suite in theirs["suites"].items()
        if key in mine["suites"] and set(suite["tasks"]) == set(mine["suites"][key]["tasks"]) <= set(alike)
    }
    other["apart"] = [task["title"] for key, task in mine["tasks"].items() if key not in alike]
    other["comparison"] = theirs | {"tasks": alike, "suites": suites}
    return other


def _alike(task: Json, mine: Json | None) -> bool:
    if mine is None or any(task[key] != mine[key] for key in ("kind", "metric", "items", "tokens")):
        return False
    return math.isclose(task["before"], mine["before"], rel_tol=1e-6, abs_tol=1e-9)


def _origin(lineage: Json) -> Json:
    parents = {name: {key: parent[key] for key in ("stage", "key")} for name, parent in lineage["parents"].items()}
    return {name: lineage[name] for name in ("stage", "key", "content")} | {"parents": parents}


def _plain(config: Mapping[str, Any]) -> Json:
    """As JSON has it, less where the results are put: a place on this machine."""
    return {name: value for name, value in json.loads(json.dumps(config, default=str)).items() if name != "output"}
