"""One task on one model: lm-evaluation-harness, with a log of every item."""

import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from controlllm.benchmark.items import items_of, metrics_of, tokens_of, write_items
from controlllm.benchmark.task import Task
from controlllm.errors import UserError
from controlllm.progress import track

Loaded = dict[str, Any]
"""What lm-eval's TaskManager gives: tasks, groups, group_map."""


def evaluate_task(task: Task, models: Any, folder: Path) -> None:
    """Write task.json, items.parquet and results.json (lm-eval's own) to `folder`.

    models: a `controlllm.benchmark.models.Models`. UserError where the task cannot be loaded or gives no such metric.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        loaded = _load(task, scratch)
        total = sum(_requests(each, task.limit) for each in loaded["tasks"].values())
        began = time.monotonic()
        with track(task.name, total=total) as advance:
            lm = models.of(task, advance)
            result = _run(task, loaded, lm)
            advance(total)
    rows = items_of(task, result.pop("samples"), lm)
    if not rows:
        raise UserError(f"{task.name}: has no items")
    write_items(folder / "items.parquet", rows)
    (folder / "results.json").write_text(json.dumps(_plain(result), indent=1, default=str))
    versions = sorted({str(version) for version in result["versions"].values()})
    about = {"title": task.title, "suite": task.suite, "kind": task.kind, "version": ", ".join(versions)}
    about |= {"items": len(rows), "tokens": tokens_of(rows), "metrics": metrics_of(task, rows)}
    about |= {"seconds": round(time.monotonic() - began, 1), "backend": models.backend(task)}
    (folder / "task.json").write_text(json.dumps(about, indent=1))


def _load(task: Task, scratch: str) -> Loaded:
    """Of our own task files the data's cache is thrown away with `scratch`: what is measured lies in the items."""
    from lm_eval.tasks import TaskManager

    from controlllm.benchmark.task import PROBES

    if task.suite != PROBES:
        from controlllm.benchmark.suites import load

        loaded = load(task)
    else:
        files = [f | {"dataset_kwargs": f["dataset_kwargs"] | {"cache_dir": scratch}} for f in task.harness]
        loaded: Loaded = {**TaskManager(include_defaults=False).load(files)}
    for each in loaded["tasks"].values():
        shots = each.get_config("num_fewshot") if task.shots is None else task.shots
        each.set_config(key="num_fewshot", value=shots or 0)
        each.set_fewshot_seed(seed=1234)  # lm-eval's own, so that its command line gives the same examples
    return loaded


def _requests(task: Any, limit: int | None) -> int:
    """How many sequences the model is going to see."""
    docs = list(task.eval_docs)[:limit]
    if task.OUTPUT_TYPE != "multiple_choice" or not docs:
        return len(docs)
    return len(docs) * len(task.doc_to_choice(docs[0]))


def _run(task: Task, loaded: Loaded, lm: Any) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    measure: Any = evaluate  # its decorator hides its type
    # Not simple_evaluate, which also asks git and a dozen programs of the system about this machine.
    result = measure(
        lm=lm,
        task_dict=loaded,
        limit=task.limit,
        log_samples=True,
        bootstrap_iters=0,
        apply_chat_template=task.chat,
        confirm_run_unsafe_code=task.kind == "code",  # in the sandbox, where the recipe allows it
        fewshot_as_multiturn=task.chat,
    )
    if result is None:
        raise RuntimeError("the harness gave no result")
    return dict(result)


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    """Without functions and paths of this machine, which lm-eval's configs hold."""
    configs = {}
    for name, config in result.get("configs", {}).items():
        kept = {k: v for k, v in config.items() if not callable(v) and k not in ("dataset_kwargs", "metadata")}
        path = kept.get("dataset_path")
        configs[name] = kept | ({"dataset_path": Path(path).name} if path and Path(path).is_absolute() else {})
    return result | {"configs": configs}
