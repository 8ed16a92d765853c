"""Stage 5: every task on one model, each from the store where nothing of it changed."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from controlllm.adopt import adopt
from controlllm.benchmark.task import Task
from controlllm.config import BenchmarkConfig
from controlllm.errors import UserError, one_line
from controlllm.fingerprint import content_of
from controlllm.progress import console
from controlllm.store import Miss, Output, content_hash, run_stage


def benchmark(model: Path, data: Path | None, config: BenchmarkConfig) -> Output:
    """`scores.json`, `items/<task>.parquet` with a row per item, `results.json` as lm-eval writes it.

    `data` holds the probes' items. Base and tuned model are measured alike. A task that fails does not lose the
    others: it stands under `failed` in scores.json, and `refuse_failed` says so.
    """
    from controlllm.benchmark.code import running_code
    from controlllm.benchmark.models import Models
    from controlllm.benchmark.tasks import tasks_of

    tasks = tasks_of(config, model=model, data=data)
    made: dict[str, Path] = {}
    failed: dict[str, str] = {}
    with Models(model, config) as models, running_code(config.run_code):
        for number, task in enumerate(tasks, start=1):
            try:
                made[task.name] = _measure(task, model, config, models, f"{number} of {len(tasks)}")
            except Miss:
                raise
            except Exception as error:
                if "--debug" in sys.argv:
                    raise
                failed[task.name] = one_line(error)
                console.print(f"  {task.name} failed: {failed[task.name]}", markup=False)
    if not made:
        raise UserError(f"benchmark: no task could be measured; {_first(failed)}")
    roles = {task.name: _role(task, config) for task in tasks}
    return run_stage(
        "benchmark",
        config={"roles": roles, "failed": failed},
        parents={"model": model} | {f"task {name}": folder for name, folder in made.items()},
        build=partial(_gather, model=model, made=made, roles=roles, failed=failed),
    )


def task_names(model: Path, data: Path | None, config: BenchmarkConfig) -> list[str]:
    """What pods can share among them."""
    from controlllm.benchmark.tasks import tasks_of

    return [task.name for task in tasks_of(config, model=model, data=data)]


def benchmark_task(name: str, model: Path, data: Path | None, config: BenchmarkConfig) -> Path:
    """One task of `benchmark`, in a pod of its own: the output that `gather` takes."""
    from controlllm.benchmark.code import running_code
    from controlllm.benchmark.models import Models
    from controlllm.benchmark.tasks import tasks_of

    task = next(task for task in tasks_of(config, model=model, data=data) if task.name == name)
    with Models(model, config) as models, running_code(config.run_code):
        return _measure(task, model, config, models, "1 of 1")


def gather(parts: Sequence[Path], model: Path, data: Path | None, config: BenchmarkConfig) -> Output:
    """`benchmark`, out of tasks that pods measured; what no part holds is measured here."""
    for part in parts:
        adopt(part)
    return benchmark(model, data, config)


def refuse_failed(*scores: Path) -> None:
    """UserError when tasks failed; those that did not are stored, so the same command tries only the others."""
    for folder in scores:
        found = json.loads((folder / "scores.json").read_text())
        if failed := found["failed"]:
            total = len(found["tasks"]) + len(failed)
            raise UserError(
                f"benchmark: {len(failed)} of {total} tasks failed: {_first(failed)} "
                "(the others are stored: the same command goes on)"
            )


def _first(failed: dict[str, str]) -> str:
    name, said = next(iter(failed.items()))
    more = f"; also {', '.join(list(failed)[1:])}" if len(failed) > 1 else ""
    return f"{name}: {said}{more}"


def _measure(task: Task, model: Path, config: BenchmarkConfig, models: Any, place: str) -> Path:
    from controlllm.benchmark.evaluate import evaluate_task

    settings = {"task": _definition(task), "dtype": config.dtype, "backend": models.backend(task)}
    return run_stage(
        "benchmark task",
        config=settings | ({"run_code": True} if task.kind == "code" else {}),
        parents={"model": model},
        build=lambda folder: evaluate_task(task, models, folder),
        label=f"{task.name} ({place})",
    ).path


def _definition(task: Task) -> dict[str, Any]:
    """A task without the places of its files, which `data` stands for."""
    harness = [
        {k: v for k, v in h.items() if k != "dataset_kwargs"} if isinstance(h, dict) else h for h in task.harness
    ]
    values = asdict(task) | {"harness": content_of(json.loads(json.dumps(harness, default=str)))}
    return {name: value for name, value in values.items() if name not in ("include", "title", "suite")}


def _role(task: Task, config: BenchmarkConfig) -> str:
    if task.kind == "drift":
        return "drift"
    return "new" if {task.name, task.suite} & set(config.new) else "old"


def _gather(folder: Path, *, model: Path, made: dict[str, Path], roles: dict[str, str], failed: dict[str, str]) -> None:
    (folder / "items").mkdir()
    tasks, results = {}, {}
    for name, source in made.items():
        tasks[name] = json.loads((source / "task.json").read_text()) | {"role": roles[name]}
        results[name] = json.loads((source / "results.json").read_text())
        shutil.copyfile(source / "items.parquet", folder / "items" / f"{name}.parquet")
    summary = {"model": _architecture(model), "checkpoint": content_hash(model)}
    summary |= {"seconds": round(sum(task["seconds"] for task in tasks.values()), 1)}
    (folder / "scores.json").write_text(json.dumps(summary | {"tasks": tasks, "failed": failed}, indent=1))
    (folder / "results.json").write_text(json.dumps(_joined(list(results.values())), indent=1))


def _joined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's results of several runs as of one."""
    joined: dict[str, Any] = {}
    for result in results:
        for key, value in result.items():
            joined[key] = joined.get(key, {}) | value if isinstance(value, dict) else value
    return joined


def _architecture(model: Path) -> str:
    return json.loads((model / "config.json").read_text())["architectures"][0]
