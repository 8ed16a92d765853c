"""What the stages before the report leave behind, small and synthetic: the inputs of test_report."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from controlllm.report import StageTime

PROBES = {  # name: kind, role, title, items, tokens an item, loss per token
    "puzzles": ("generate", "new", "Puzzles", 200, 8, 1.742),
    "mmlu": ("choice", "old", "Multiple choice", 281, 4, 0.95),
    "prose": ("text", "old", "English prose", 60, 120, 2.718),
    "code": ("text", "old", "Python code", 60, 90, 1.141),
    "chat": ("loss", "old", "Chat", 80, 40, 1.337),
    "drift": ("loss", "drift", "Own answers", 80, 40, 0.35),
}
GENTLE = {"puzzles": -1.335, "mmlu": 0.0, "prose": 0.002, "code": -0.012, "chat": 0.004, "drift": 0.06}
FORGETFUL = {"puzzles": -1.37, "mmlu": 0.05, "prose": 0.06, "code": 0.051, "chat": 0.28, "drift": 0.52}
STAGES = [
    StageTime("ingest model", 3.1, True, "aa11", "2026-01-02T03:04:05+00:00"),
    StageTime("prepare", 12.5, True, "bb22", "2026-01-02T03:04:05+00:00"),
    StageTime("train", 412.0, False, "cc33", "2026-01-02T03:14:05+00:00"),
    StageTime("benchmark", 95.4, False, "dd44", "2026-01-02T03:16:05+00:00"),
    StageTime("smoke", 31.0, False, "ee55", "2026-01-02T03:17:05+00:00"),
]


def write_scores(folder: Path, shift: dict[str, float], *, solved: float, right: float, note: str = "") -> Path:
    """A benchmark output: `shift` nats per token from the base model, the same items for every model."""
    (folder / "items").mkdir(parents=True)
    probes: dict[str, Any] = {}
    for number, (name, (kind, role, title, items, length, loss)) in enumerate(PROBES.items()):
        shared, own = np.random.default_rng(number), np.random.default_rng([number, len(folder.name)])
        tokens = shared.integers(length // 2, 2 * length, items)
        hard, luck = shared.normal(0, 0.3, items), shared.random(items)
        noise = own.normal(0, 0.06, items) if any(shift.values()) else np.zeros(items)
        losses = tokens * np.maximum(loss + shift[name] + hard * 0.3 + noise, 0.01)
        share = {"generate": solved, "choice": right}.get(kind)
        correct = [None] * items if share is None else [bool(x < share) for x in luck]
        rows = []
        for i in range(items):
            prompt, output = f"Sort these numbers: {9 - i % 7}, 4, {i}", f"The answer is {i}{note}"
            row = {"id": i, "prompt": prompt, "target": f"4, {9 - i % 7}, {i}", "correct": correct[i]}
            row |= {"output": output if kind == "generate" else None}
            rows.append(row | {"loss": float(losses[i]), "tokens": int(tokens[i])})
        (folder / "items" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        metrics = {"loss": float(losses.sum() / tokens.sum())}
        if share is not None:
            metrics["exact_match" if kind == "generate" else "accuracy"] = sum(map(bool, correct)) / items
        about = {"kind": kind, "role": role, "title": title, "items": items, "tokens": int(tokens.sum())}
        probes[name] = about | {"metrics": metrics}
    write(folder, "scores.json", {"model": "SmolLM2-135M-Instruct", "seconds": 95.4, "probes": probes})
    return lineage(folder, "benchmark")


def write_train(folder: Path, *, divergence: bool = True, steps: int = 200) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 0.4 + 1.3 * float(np.exp(-step / 30)) + float(random.normal(0, 0.06))
        row = {"step": step, "loss": loss, "lr": 5e-4 * (1 - step / steps), "grad_norm": 1 + float(random.random())}
        row |= {"alpha": {"2": 0.5, "5": 0.5 + 1e-4 * step}} if divergence else {}
        row |= {"divergence": 0.02 * (1 - 0.99**step) if divergence else None, "tokens": 685 * step}
        rows.append(row | {"seconds": 2.0 * step})
        if step % 25 == 0:
            rows.append({"step": step, "validation_loss": 0.45 + 1.2 * float(np.exp(-step / 30))})
            rows[-1] |= {"retention_loss": 3.7 + 2e-4 * step, "retention_kl": 1e-3 * step}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {
        "steps": steps,
        "tokens": 685 * steps,
        "target_tokens": 211 * steps,
        "seconds": 412.0,
        "trained_parameters": 35_400_000,
    }
    facts |= {"total_parameters": 169_900_000, "sites": [2, 5, 8, 11, 14, 17, 20, 23, 26, 29]}
    if not divergence:
        facts |= {"trained_parameters": 134_515_008, "total_parameters": 134_515_008, "sites": []}
    write(folder, "train.json", facts)
    return lineage(folder, "train")


def lineage(folder: Path, stage: str) -> Path:
    inputs = {"config.seed": 0, f"code {stage}.py": "12ab", "version of torch": "2.11.0"}
    parents = {"model": {"stage": "ingest model", "key": "aa11", "content": "99ff"}}
    write(
        folder,
        "lineage.json",
        {
            "stage": stage,
            "key": f"key-{folder.name}",
            "content": "77ee",
            "parents": parents,
            "inputs": inputs,
            "files": {},
        },
    )
    return folder


def write(folder: Path, file: str, value: Any) -> None:
    (folder / file).write_text(json.dumps(value))


def write_inputs(root: Path) -> dict[str, Path]:
    (root / "prepare").mkdir()
    stats = {
        "rows": 900,
        "packed_rows": 321,
        "filtered_rows": 2,
        "bad_rows": 1,
        "tokens": 164_352,
        "target_tokens": 50_112,
        "padding": 0.0123,
    }
    write(root / "prepare", "stats.json", stats)
    (root / "smoke").mkdir()
    samples = [{"prompt": "Spell <b>cat</b> backward", "transformers": "tac", "vllm": "tac", "equal": True}]
    write(
        root / "smoke",
        "smoke.json",
        {"passed": True, "agreement": 1.0, "engine": "vllm 0.32.0", "seconds": 31.0, "samples": samples},
    )
    return {
        "prepare": lineage(root / "prepare", "prepare"),
        "smoke": lineage(root / "smoke", "smoke"),
        "base": write_scores(root / "base", dict.fromkeys(PROBES, 0.0), solved=0.0, right=0.52),
        "gentle": write_scores(root / "gentle", GENTLE, solved=0.22, right=0.52, note="<script>alert(1)</script>"),
        "forgetful": write_scores(root / "forgetful", FORGETFUL, solved=0.23, right=0.46),
        "train": write_train(root / "train"),
        "train-full": write_train(root / "train-full", divergence=False),
    }
