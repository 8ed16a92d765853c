"""Stage 5: lm-evaluation-harness on the probes, with a log of every item."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from controlllm.config import BenchmarkConfig
from controlllm.data.probes import PROBES, Probe
from controlllm.progress import track
from controlllm.store import Output, run_stage

TASKS = Path(__file__).parent / "benchmarks"


def benchmark(model: Path, data: Path, config: BenchmarkConfig) -> Output:
    """`scores.json`, and `items/<probe>.jsonl` with a row per item. Base and tuned model are measured alike."""

    def build(folder: Path) -> None:
        probes = [PROBES[name] for name in (*config.new, *config.old)]
        samples, seconds, lm = _evaluate(model, data, probes, config)
        scores: dict[str, Any] = {}
        for probe in probes:
            items = _items(probe, samples, lm)
            role = "drift" if probe.kind == "drift" else "new" if probe.name in config.new else "old"
            scores[probe.name] = {"kind": probe.kind, "role": role, "title": probe.title} | _score(probe, items)
            _write(folder / "items" / f"{probe.name}.jsonl", items)
        summary = {"model": _architecture(model), "seconds": round(seconds, 1), "probes": scores}
        (folder / "scores.json").write_text(json.dumps(summary, indent=1))

    settings = config.model_dump(exclude={"items", "batch_size"})
    return run_stage(
        "benchmark", config={"benchmark": settings}, parents={"model": model, "ingest data": data}, build=build
    )


def _evaluate(
    model: Path, data: Path, probes: list[Probe], config: BenchmarkConfig
) -> tuple[dict[str, Any], float, Any]:
    """Samples by task name, the time it took, and the model as the harness sees it."""
    import logging
    import time

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    from controlllm.harness import CountingLM
    from controlllm.tuned import load_tuned

    datasets.disable_progress_bars()
    measure: Any = evaluate  # its decorator hides its type
    loaded = load_tuned(model, dtype=config.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, track("benchmark", total=_requests(data, probes)) as advance:
        tasks = [_task(name, data, scratch) for name in task_names(probes)]
        lm = CountingLM(loaded.to(device).eval(), AutoTokenizer.from_pretrained(model), config.batch_size, advance)
        loaded_tasks = TaskManager(include_defaults=False).load(tasks)
        # Not simple_evaluate, which also asks git and a dozen programs of the system about this machine.
        result = measure(lm=lm, task_dict=loaded_tasks, log_samples=True, bootstrap_iters=0)
    if result is None:
        raise RuntimeError("the harness gave no result")
    return result["samples"], time.monotonic() - began, lm


def task_names(probes: list[Probe]) -> list[str]:
    """The harness tasks behind the probes: generated answers are scored by their loss, too."""
    return [
        name
        for probe in probes
        for name in ([probe.name, f"{probe.name}_loss"] if probe.kind == "generate" else [probe.name])
    ]


def _requests(data: Path, probes: list[Probe]) -> int:
    """How many sequences the model is going to see."""
    each = {"generate": 2, "choice": 4}
    return sum(each.get(probe.kind, 1) * len(_lines(data / "probes" / f"{probe.name}.jsonl")) for probe in probes)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def _task(name: str, data: Path, scratch: str) -> dict[str, Any]:
    """A task file of the package, with this run's items as its data."""
    task = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    items = data / "probes" / f"{name.removesuffix('_loss')}.jsonl"
    return task | {"dataset_kwargs": {"data_files": {"test": str(items)}, "cache_dir": scratch}}


def _items(probe: Probe, samples: Mapping[str, Any], lm: Any) -> list[dict[str, Any]]:
    by_loss = samples[f"{probe.name}_loss" if probe.kind == "generate" else probe.name]
    generated = {s["doc_id"]: s for s in samples[probe.name]} if probe.kind == "generate" else {}
    return [_item(probe, s, generated.get(s["doc_id"]), lm) for s in sorted(by_loss, key=lambda s: s["doc_id"])]


def _item(probe: Probe, sample: dict[str, Any], generated: dict[str, Any] | None, lm: Any) -> dict[str, Any]:
    """{id, prompt, target, output, correct, loss (nats over the target's tokens), tokens}."""
    doc = sample["doc"]
    if probe.kind == "text":
        prompt, target = "", doc["text"]
        log_likelihood = sample["filtered_resps"][0]
        tokens = lm.count(target)
    else:
        chosen = doc["answer"] if probe.kind == "choice" else 0
        prompt, target = _argument(sample, chosen)
        log_likelihood = sample["filtered_resps"][chosen][0]
        tokens = lm.count_after(prompt, target)
    item = {"id": doc["id"], "prompt": prompt, "target": doc.get("target", target), "output": None, "correct": None}
    if generated is not None:
        item |= {"output": generated["resps"][0][0], "correct": bool(generated["exact_match"])}
    elif probe.kind == "choice":
        item |= {"correct": bool(sample["acc_norm"])}
    return item | {"loss": round(-float(log_likelihood), 6), "tokens": tokens}


def _argument(sample: dict[str, Any], index: int) -> tuple[str, str]:
    arguments = sample["arguments"]
    pair = arguments[f"gen_args_{index}"] if isinstance(arguments, dict) else arguments[index]
    return (pair["arg_0"], pair["arg_1"]) if isinstance(pair, dict) else (pair[0], pair[1])


def _score(probe: Probe, items: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = sum(item["tokens"] for item in items)
    metrics = {"loss": sum(item["loss"] for item in items) / tokens}
    if probe.kind in ("generate", "choice"):
        name = "exact_match" if probe.kind == "generate" else "accuracy"
        metrics[name] = sum(item["correct"] for item in items) / len(items)
    return {"items": len(items), "tokens": tokens, "metrics": metrics}


def _architecture(model: Path) -> str:
    return json.loads((model / "config.json").read_text())["architectures"][0]


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
