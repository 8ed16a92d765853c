"""A finished run in a real store, without training: what card, push and reproduce start from."""

import json
import shutil
from pathlib import Path
from typing import Any

from controlllm.base_facts import keep_facts
from controlllm.config import RunConfig
from controlllm.data.manifest import list_source
from controlllm.fingerprint import content_of
from controlllm.store import content_hash, run_stage

DATA = "".join(json.dumps({"prompt": f"{n} + 1", "completion": str(n + 1)}) + "\n" for n in range(40))
TRAIN = {"steps": 160, "tokens": 74_989, "target_tokens": 5_992, "seconds": 260.1, "processes": 1}
TRAIN |= {"trained_parameters": 21_240_582, "total_parameters": 155_755_590, "sites": [1, 3]}
STATS = {"rows": 40, "filtered_rows": 3, "bad_rows": 1, "tokens": 9_000, "target_tokens": 1_200}


def change(metric: str, before: float, after: float, spread: float) -> dict[str, Any]:
    moved = after - before
    ends = {"before": before, "after": after, "difference": moved, "low": moved - spread, "high": moved + spread}
    return {"metric": metric, "items": 96, "tokens": 890} | ends


def task(title: str, role: str, verdict: str, primary: dict[str, Any], **more: dict[str, Any]) -> dict[str, Any]:
    metrics = {primary["metric"]: primary, **more}
    about = {"title": title, "suite": "probes", "kind": "generate", "role": role, "verdict": verdict, "detail": verdict}
    return about | primary | {"metrics": metrics}


def summary(**more: Any) -> dict[str, Any]:
    sums = task(
        "Puzzles", "new", "learned", change("exact_match", 0.0, 0.23, 0.08), loss=change("loss", 2.08, 0.42, 0.3)
    )
    prose = task("English prose", "old", "kept", change("loss", 3.741, 3.734, 0.004))
    chat = task("Chat", "old", "forgot", change("loss", 2.3, 2.6, 0.1))
    drift = task("Own answers", "drift", "drifted", change("loss", 0.79, 0.92, 0.02))
    tasks = {"puzzles": sums, "prose": prose, "chat": chat, "drift": drift}
    overall = {"verdict": "forgot", "sentence": "Puzzles learned; chat forgotten."}
    facts = {
        "name": "demo",
        "method": "Control LLM (concat-lerp, mse, E = 2)",
        "base": "tiny",
        "headline": "Puzzles learned.",
    }
    return facts | {"comparison": {"tasks": tasks, "suites": {}, "overall": overall}, "train": TRAIN} | more


def make_run(
    here: Path,
    base: Path,
    *,
    facts: dict[str, Any] | None = None,
    numbers: dict[str, Any] | None = None,
) -> Path:
    """`here/runs/demo`, its stages in the store that CONTROLLLM_CACHE names. facts: what the base states of itself."""
    (here / "questions.jsonl").write_text(DATA)
    dataset = {"name": "mine", "source": str(here / "questions.jsonl"), "format": "prompt_completion"}
    tree = {"name": "demo", "model": {"name": str(base)}, "control": {"num_expanded": 2}, "smoke": None}
    tree |= {"mix": {"datasets": [dataset]}, "pack": {"context_length": 256}}
    config = RunConfig.model_validate(tree)
    found = list_source(dataset["source"], unit_rows=config.pack.unit_rows)

    def ingest(folder: Path) -> None:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        keep_facts(facts or {}, folder)

    def list_data(folder: Path) -> None:
        write(folder / "manifests" / "mine.json", found.to_json())

    def consolidate(folder: Path) -> None:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        _describe(folder, model, facts or {})

    source = {"source": {"mine": content_of(found.to_json())}}
    model = _stage("ingest model", {"model": config.model}, {}, ingest)
    data = _stage("ingest data", source, {"ingest model": model}, list_data)
    shards = _stage("prepare", {"pack": config.pack}, {"ingest data": data}, lambda f: write(f / "stats.json", STATS))
    trained = _stage("train", {"train": config.train}, {"prepare": shards}, lambda f: write(f / "train.json", TRAIN))
    tuned = _stage("consolidate", {}, {"ingest model": model, "train": trained}, consolidate)
    inputs = {"run": config.model_dump(exclude={"output"}), "contrast": {}}
    told = numbers or summary()
    report = _stage("report", inputs, {"train": trained}, lambda f: write(f / "summary.json", told))
    run = here / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "model").symlink_to(tuned)
    (run / "summary").symlink_to(report)
    return run


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def _stage(name: str, config: Any, parents: dict[str, Path], build: Any) -> Path:
    return run_stage(name, config=config, parents=parents, build=build).path


def _describe(folder: Path, base: Path, facts: dict[str, Any]) -> None:
    """As consolidation does."""
    values = json.loads((folder / "config.json").read_text())
    control = {"sites": [1, 3], "layout": "concat", "interpolation": "lerp", "alpha": 0.5, "alpha_scale": 1.0}
    lineage = {"base_model": base.name, "base_content": content_hash(base), "base": facts}
    lineage |= {"data": {"datasets": ["mine"]}, "code": {"controlllm": "0.1.0"}}
    values |= {"model_type": "controlllm", "base_model_type": "llama", "control": control, "lineage": lineage}
    write(folder / "config.json", values)
