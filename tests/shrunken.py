"""A recipe's run, small enough for a test: other weights, few rows, few steps; everything else as it is written."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from controlllm import pipeline
from controlllm.config import RunConfig, load_config
from controlllm.train.distributed import World

RECIPES = Path(__file__).parents[1] / "workflows/recipes"
ROWS = Path(__file__).parent / "unit/dataset_rows.jsonl"
STEPS = 3
CONTEXT = 1024

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 131072,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_8B = LLAMA | {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B": LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
    "meta-llama/Llama-3.1-70B-Instruct": LLAMA | {
        "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
    },
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 40960,
        "num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""What the config.json of the recipes' models says of their sizes."""


def recipes() -> list[str]:
    """Those whose model is on the Hub."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml") if load_config(file).model.name in PUBLISHED)


def shrunken(name: str, folder: Path, tokenizer: Any) -> list[str]:
    """What has to be written behind the recipe; all that it changes stands here.

    The model is a random one of the same family, with two sites at the distance they have in the real one. The rows are
    in the form in which the dataset is published. Warm-up takes its share of the steps.
    """
    config = load_config(RECIPES / f"{name}.yaml")
    train, parallel, validation = config.train, config.train.parallel, config.validation
    changes: dict[str, Any] = {
        "output": str(folder / "runs"),
        "model.name": str(_base(config, folder, tokenizer)),
        "pack.context_length": CONTEXT,
        "pack.validation_fraction": 0.2,
        "train.global_batch_size": 4,
        "train.checkpoint.every": 2,
        "benchmark.items": 2,
        "mix.decontaminate": "none",  # the suites' items are on the Hub
    }
    if config.control:
        changes["control.num_expanded"] = 2
    for index, dataset in enumerate(config.mix.datasets):
        count = round(60 / dataset.fraction)
        changes[f"mix.datasets.{index}.source"] = str(_rows(dataset.name, count, folder))
    if train.steps:
        changes["train.steps"] = STEPS
        changes["train.schedule.warmup_steps"] = max(1, STEPS * train.schedule.warmup_steps // train.steps)
    elif train.tokens:
        changes["train.tokens"] = tokens = STEPS * 4 * CONTEXT * 3 // 4  # rows are not quite full
        changes["train.schedule.warmup_tokens"] = tokens * train.schedule.warmup_tokens // train.tokens
    if parallel.kind == "fsdp" and parallel.shards:
        changes |= {"train.parallel.shards": 2}
    if validation:
        changes |= {"validation.every": 2, "validation.rows": 1}
        if validation.retention:
            changes |= {"validation.retention.items": 2}
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def _base(config: RunConfig, folder: Path, tokenizer: Any) -> Path:
    """A Hugging Face directory; one of a pretrained model without instructions has no chat template."""
    real = PUBLISHED[config.model.name]
    layers = 2 * real["num_hidden_layers"] // config.control.num_expanded if config.control else 4
    chat = "Llama" not in config.model.name or "Instruct" in config.model.name
    place = folder / f"{real['model_type']}-{layers}{'' if chat else '-base'}"
    if place.exists():
        return place
    sizes = {
        "num_hidden_layers": layers, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 258, "max_position_embeddings": 2048,
        "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    family = getattr(transformers, real["architectures"][0])
    torch.manual_seed(0)
    family(family.config_class(**{**real, **sizes})).save_pretrained(place)
    tokenizer.save_pretrained(place)
    if not chat:
        (place / "chat_template.jinja").unlink()
    return place


def _rows(dataset: str, count: int, folder: Path) -> Path:
    """As many different rows as wanted, made from those that show how the dataset is published."""
    shown = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    rows = [line["row"] for line in shown if line["name"] == dataset]
    file = folder / f"{dataset}-{count}.jsonl"
    if file.exists():
        return file
    lines = (json.dumps(_numbered(rows[n % len(rows)], n), ensure_ascii=False) for n in range(count))
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def _numbered(value: Any, number: int) -> Any:
    """Every text begins with the number, except for those that say who speaks."""
    if isinstance(value, str):
        return re.sub(r"^(### Human: )?", rf"\g<1>{number}. ", value)
    if isinstance(value, list):
        return [_numbered(part, number) for part in value]
    if isinstance(value, dict):
        return {k: v if k in ("role", "from") else _numbered(v, number) for k, v in value.items()}
    return value


def run_them(world: World, folder: str, runs: dict[str, list[str]], ports: list[int]) -> None:
    """From ingest to consolidate, one recipe after the other, each with a store of its own."""
    if world.size > 1:
        torch.distributed.destroy_process_group()  # each training joins by itself
    for (name, overrides), port in zip(runs.items(), ports, strict=True):
        os.environ |= {"CONTROLLLM_CACHE": f"{folder}/{name}", "MASTER_PORT": str(port)}
        try:
            pipeline.run(load_config(RECIPES / f"{name}.yaml", *overrides), until="consolidate")
        except BaseException as error:
            error.add_note(f"recipe {name}")
            raise


def hub_cache(folder: Path) -> Path:
    """What the Hub's cache holds of the recipes' models when only their config.json was asked for."""
    for name, facts in PUBLISHED.items():
        place = folder / f"models--{name.replace('/', '--')}"
        snapshot = place / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(facts))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(snapshot.name)
    return folder
