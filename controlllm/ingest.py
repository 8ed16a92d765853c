"""Stage 1: the base model as safetensors; what the training data is, file by file; items to measure with."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from controlllm.benchmark.questions import suite_questions
from controlllm.benchmark.tasks import probes_of, suite_tasks_of
from controlllm.config import BenchmarkConfig, MixConfig, ModelConfig, PackConfig
from controlllm.data.catalog import find_dataset
from controlllm.data.manifest import Manifest, list_source
from controlllm.data.probes import HELD_OUT_SEED, PROBES, Probe
from controlllm.data.sources import BIGBENCH, GYM, read_rows
from controlllm.errors import UserError
from controlllm.fingerprint import content_of
from controlllm.progress import track
from controlllm.store import Output, run_stage

# Procedural puzzles have no end: this many are held out when `benchmark.items` does not say.
HELD_OUT_ITEMS = 160
DRIFT_TOKENS = 40


def ingest_model(model: ModelConfig) -> Output:
    """A Hugging Face directory with weights as safetensors and the tokenizer."""

    def build(folder: Path) -> None:
        from controlllm.base_model import save_base

        save_base(model, folder)
        _check_tokenizer(folder, model.name)

    from controlllm.base_model import source_stamp

    config = model.model_dump(include={"name", "revision"}) | {"source": source_stamp(model)}
    return run_stage("ingest model", config={"model": config}, parents={}, build=build)


def _check_tokenizer(folder: Path, name: str) -> None:
    """It loads, without code of its own, and gives no id that the model has no embedding for."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library raises anything, Exception itself too
        said = (str(error).splitlines() or [""])[0].replace(str(folder), name)
        raise UserError(
            f"model.name: the tokenizer of '{name}' cannot be loaded: {type(error).__name__}: {said}"
        ) from error
    config = json.loads((folder / "config.json").read_text())
    size = (config.get("text_config") or config).get("vocab_size")
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if size is not None and highest >= size:
        raise UserError(
            f"model.name: the tokenizer of '{name}' has the token {token!r} with id {highest}, the model only "
            f"{size} embeddings; remove such tokens or call the model's resize_token_embeddings"
        )


def ingest_data(base: Path, mix: MixConfig | None, benchmark: BenchmarkConfig, pack: PackConfig) -> Output:
    """`manifests/<dataset>.json`, `probes/<probe>.jsonl`, and `held_out/`, which keeps the one out of the other.

    The sources are listed each time, so that a file that was changed, moved or added is noticed; their rows stay where
    they are. Without a mix there is only what is measured.
    """
    datasets = mix.datasets if mix else []
    manifests = {d.name: _manifest(d, where=f"mix.datasets.{i}", pack=pack) for i, d in enumerate(datasets)}

    measured_probes = probes_of(benchmark)

    def build(folder: Path) -> None:
        from transformers import AutoTokenizer

        from controlllm.data.held_out import HeldOut

        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        measured: list[dict[str, Any]] = []
        for name in measured_probes:
            items = _probe_items(PROBES[name], base, tokenizer, benchmark)
            _write(folder / "probes" / f"{name}.jsonl", items)
            measured += items
        if mix and mix.decontaminate != "none":
            measured += suite_questions(benchmark)
            held_out = HeldOut.of(measured, mode=mix.decontaminate, words=mix.decontaminate_words)
            if held_out:
                held_out.save(folder / "held_out")
        (folder / "manifests").mkdir()
        for name, manifest in manifests.items():
            (folder / "manifests" / f"{name}.json").write_text(json.dumps(manifest.to_json(), indent=1))

    config = {
        "mix": mix and mix.model_dump(include={"decontaminate", "decontaminate_words"}),
        "probes": {name: benchmark.items_of(name) for name in measured_probes},
        "source": {name: content_of(manifest.to_json()) for name, manifest in manifests.items()},
    }
    if mix and mix.decontaminate != "none":
        config["suites"] = {task.name: task.data or "Hub" for task in suite_tasks_of(benchmark)}
    return run_stage("ingest data", config=config, parents={"ingest model": base}, build=build)


def _manifest(dataset: Any, *, where: str, pack: PackConfig) -> Manifest:
    source = find_dataset(dataset).source
    try:
        return list_source(source, unit_rows=pack.unit_rows, rows=dataset.rows, seed=dataset.seed)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _fingerprint(item: dict[str, Any]) -> str:
    """Equal for the same question, whoever answers it."""
    text = item["messages"][0]["content"] if "messages" in item else item.get("text") or item["prompt"]
    return " ".join(text.split()).lower()


def _probe_items(probe: Probe, base: Path, tokenizer: Any, benchmark: BenchmarkConfig) -> list[dict[str, Any]]:
    from controlllm.data.bigbench import fetch
    from controlllm.data.render import chat_text

    if probe.source.startswith(f"pkg://{BIGBENCH}/"):
        fetch()
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

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, trust_remote_code=False)
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
