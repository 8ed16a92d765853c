"""Results of the benchmark stage, written by hand: what test_compare and test_statistics compare."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from controlllm.benchmark.items import write_items


def hits(right: Sequence[Any], *, role: str = "old", suite: str = "general", **more: Any) -> dict[str, Any]:
    return {"correct": [bool(each) for each in right], "role": role, "suite": suite, "kind": "choice"} | more


def losses(values: Sequence[float], tokens: Sequence[int], *, role: str = "old", **more: Any) -> dict[str, Any]:
    """Nats of each item."""
    return {"loss": list(map(float, values)), "tokens": list(tokens), "role": role, "suite": "probes"} | more


def flipped(right: Sequence[Any], *, lost: int, gained: int) -> list[bool]:
    """The first `lost` right answers made wrong, the first `gained` wrong ones right."""
    right = np.array(right, dtype=bool)
    after = right.copy()
    after[np.flatnonzero(right)[:lost]] = False
    after[np.flatnonzero(~right)[:gained]] = True
    return after.tolist()


def write_results(folder: Path, tasks: dict[str, dict[str, Any]], *, failed: dict[str, str] | None = None) -> Path:
    """tasks: as hits and losses give them, also with prompt, output, subtask of each item, and the metric."""
    scores = {}
    for name, task in tasks.items():
        count = len(task.get("correct", task.get("loss", task.get("score"))))
        rows: list[dict[str, Any]] = []
        for i in range(count):
            row = {"id": i, "subtask": name, "prompt": f"{name} question {i}", "target": f"answer {i}", "tokens": 0}
            row |= dict.fromkeys(("output", "correct", "score", "loss"))
            columns = ("subtask", "prompt", "output", "correct", "score", "loss", "tokens")
            rows.append(row | {column: task[column][i] for column in columns if column in task})
        write_items(folder / "items" / f"{name}.parquet", rows)
        metrics = {task.get("metric", "accuracy"): float(np.mean(task["correct"]))} if "correct" in task else {}
        metrics |= {"score": float(np.mean(task["score"]))} if "score" in task else {}
        metrics |= {"loss": float(np.sum(task["loss"]) / np.sum(task["tokens"]))} if "loss" in task else {}
        about = {"title": name.title(), "kind": task.get("kind", "text"), "role": task["role"], "suite": task["suite"]}
        scores[name] = about | {"items": count, "tokens": sum(task.get("tokens", [0])), "version": "1"}
        scores[name] |= {"metrics": metrics}
    summary = {"model": "LlamaForCausalLM", "checkpoint": "c0ffee", "seconds": 1.0, "tasks": scores}
    (folder / "scores.json").write_text(json.dumps(summary | {"failed": failed or {}}))
    return folder
