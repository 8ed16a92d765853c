"""Stage 1: the base model as safetensors, and the data as JSON lines: rows to train on, items to measure with."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from controlllm.config import BenchmarkConfig, DatasetConfig, MixConfig, ModelConfig
from controlllm.data.catalog import find_dataset
from controlllm.data.probes import HELD_OUT_SEED, PROBES, Probe
from controlllm.data.sources import GYM, read_rows, source_files
from controlllm.errors import UserError
from controlllm.progress import console, track
from controlllm.store import Output, run_stage

# Procedural puzzles have no end: this many are held out when `benchmark.items` does not say.
HELD_OUT_ITEMS = 160
DRIFT_TOKENS = 40


def ingest_model(model: ModelConfig) -> Output:
    """A Hugging Face directory with weights as safetensors and the tokenizer."""

    def build(folder: Path) -> None:
        from controlllm.base_model import save_base

        save_base(model, folder)

    from controlllm.base_model import source_stamp

    config = model.model_dump(include={"name", "revision"}) | {"source": source_stamp(model)}
    return run_stage("ingest model", config={"model": config}, parents={}, build=build)


def ingest_data(base: Path, mix: MixConfig, benchmark: BenchmarkConfig) -> Output:
    """`train/<dataset>.jsonl` and `probes/<probe>.jsonl`; nothing that is measured stands in what is trained on."""

    def build(folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base)
        probes = [PROBES[name] for name in (*benchmark.new, *benchmark.old)]
        held_out: set[str] = set()
        for probe in probes:
            items = _probe_items(probe, base, tokenizer, benchmark)
            _write(folder / "probes" / f"{probe.name}.jsonl", items)
            held_out |= {_fingerprint(item) for item in items}
        for dataset in mix.datasets:
            kept = list(_documents(dataset, held_out))
            if not kept:
                raise UserError(f"mix.datasets.{dataset.name}: no row is left to train on")
            _write(folder / "train" / f"{dataset.name}.jsonl", kept)

    config = {
        "mix": {"datasets": [d.model_dump(exclude={"weight"}) for d in mix.datasets]},
        "benchmark": benchmark.model_dump(include={"new", "old", "items"}),
        "source": {d.name: _stamp(find_dataset(d).source) for d in mix.datasets},
    }
    return run_stage("ingest data", config=config, parents={"ingest model": base}, build=build)


def _stamp(source: str) -> Any:
    """What would change if the source's files did."""
    if source.startswith(GYM):
        return source
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in source_files(source)}


def _documents(config: DatasetConfig, held_out: set[str]) -> Iterator[dict[str, Any]]:
    """Rows as documents, each once; what is also a held-out item is left out, and counted aloud."""
    dataset = find_dataset(config)
    seen: set[str] = set()
    repeated = measured = 0
    for number, row in enumerate(read_rows(dataset.source, rows=config.rows, seed=config.seed), start=1):
        try:
            document = dataset.convert(row)
        except UserError as error:
            raise UserError(f"mix.datasets.{config.name}: {dataset.source} row {number}: {error}") from None
        if document is None:
            continue
        item = {"text": document} if isinstance(document, str) else {"messages": document}
        mark = _fingerprint(item)
        if mark in held_out:
            measured += 1
        elif mark in seen:
            repeated += 1
        else:
            seen.add(mark)
            yield item
    if repeated or measured:
        console.print(
            f"  {config.name}: left out {repeated} repeated rows and {measured} that are held out for measuring"
        )


def _fingerprint(item: dict[str, Any]) -> str:
    """Equal for the same question, whoever answers it."""
    text = item["messages"][0]["content"] if "messages" in item else item.get("text") or item["prompt"]
    return " ".join(text.split()).lower()


def _probe_items(probe: Probe, base: Path, tokenizer: Any, benchmark: BenchmarkConfig) -> list[dict[str, Any]]:
    from controlllm.data.render import chat_text

    limit = benchmark.items_of(probe.name) or (HELD_OUT_ITEMS if probe.source.startswith(GYM) else None)
    rows = read_rows(probe.source, rows=limit if probe.source.startswith(GYM) else None, seed=HELD_OUT_SEED)
    unique = {_fingerprint(item): item for row in rows for item in probe.items(row)}
    items = list(unique.values())
    if limit is not None and len(items) > limit:
        items = [items[i * len(items) // limit] for i in range(limit)]  # spread over the whole source
    for number, item in enumerate(items):
        item["id"] = number
        if "messages" in item:
            item["prompt"] = chat_text(item["messages"], tokenizer, prompt=True)
            item["eos"] = tokenizer.eos_token
    if probe.kind == "drift":
        _add_greedy_answers(items, base, tokenizer)
    return items


def _add_greedy_answers(items: list[dict[str, Any]], base: Path, tokenizer: Any, *, batch: int = 16) -> None:
    """The base model's own answers become the targets."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    tokenizer.padding_side = "left"
    with track("base answers", total=len(items)) as advance:
        for start in range(0, len(items), batch):
            some = items[start : start + batch]
            inputs = tokenizer([i["prompt"] for i in some], return_tensors="pt", padding=True, add_special_tokens=False)
            made = model.generate(
                **inputs, max_new_tokens=DRIFT_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
            )
            for item, ids in zip(some, made[:, inputs["input_ids"].shape[1] :], strict=True):
                item["target"] = tokenizer.decode(ids, skip_special_tokens=True)
                item["eos"] = tokenizer.eos_token if tokenizer.eos_token_id in ids else ""
            advance(start + len(some))


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
