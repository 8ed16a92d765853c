"""What a report says about data, cost and environment."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlllm.private import clean

Json = dict[str, Any]
REASONS = {
    "measured": "asks what is measured (decontamination)",
    "repeated": "repeats an earlier document (deduplication)",
    "overlong": "longer than the context",
    "bad": "cannot be used (quarantine)",
}
CUTS = {"split": "documents split", "truncated": "documents truncated", "lost_tokens": "tokens cut off"}


def data_facts(stats: Json, mix: Mapping[str, Any], quarantine: Path) -> Json:
    """stats.json, with why rows were left out, what share of the mix each dataset has, and what bad rows had."""
    shares = {one["name"]: one for one in mix.get("datasets", ())}
    datasets = []
    for name, facts in stats.get("datasets", {}).items():
        left_out = {REASONS.get(reason, f"step {reason}"): count for reason, count in facts["filtered"].items()}
        left_out |= {REASONS["bad"]: facts["bad_rows"]} if facts["bad_rows"] else {}
        cut = {CUTS.get(kind, kind): count for kind, count in facts["cut"].items()}
        share = {key: shares.get(name, {}).get(key) for key in ("weight", "epochs")}
        datasets.append(facts | share | {"name": name, "left_out": left_out, "cut": cut})
    reasons = Counter(json.loads(line)["reason"] for line in quarantine.open()) if quarantine.exists() else Counter()
    return stats | {"datasets": datasets, "bad": [[clean(reason), n] for reason, n in reasons.most_common(5)]}


def cost(metrics: Sequence[Json], train: Json, stages: Sequence[Json], predicted: int | None) -> Json:
    """Time, useful FLOPs of all processes, tokens per second, and the largest memory of a process in bytes."""
    steps = [row for row in metrics if "loss" in row]
    flops = sum(row["tflops"] * 1e12 * row["seconds"] for row in steps if row.get("tflops"))
    memory = [row["memory_gb"] for row in steps if row.get("memory_gb")]
    return {
        "seconds": sum(stage["seconds"] for stage in stages),
        "train_seconds": train["seconds"],
        "tokens_per_second": train["tokens"] / train["seconds"] if train["seconds"] else None,
        "flops": flops * train.get("processes", 1) or None,
        "mfu": _share(sum(row.get("mfu", 0) * row["seconds"] for row in steps), sum(row["seconds"] for row in steps)),
        "waiting": _share(
            sum(row.get("data_seconds", 0) for row in steps), sum(row.get("seconds", 0) for row in steps)
        ),
        "skipped": sum(row.get("skipped", 0) for row in steps),
        "memory": round(max(memory) * 1e9) if memory else None,
        "memory_predicted": predicted,
    }


def environment(train: Json, lineage: Mapping[str, Json]) -> Json:
    """The machine's kind as training wrote it down, and every version that a stage's key holds."""
    versions: dict[str, str] = {}
    for made in lineage.values():
        found = {
            name.removeprefix("version of "): v for name, v in made["inputs"].items() if name.startswith("version")
        }
        versions |= {name: version for name, version in found.items() if version}
    machine = dict(train.get("environment") or {})
    versions |= machine.pop("versions", {})
    return {"machine": machine, "versions": dict(sorted(versions.items()))}


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
