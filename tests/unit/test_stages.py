"""The stages without Flyte, on a tiny model: what they write is whole and honest."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import controlllm  # noqa: F401
from controlllm import pipeline
from controlllm.config import load_config
from controlllm.data.catalog import CATALOG
from controlllm.data.probes import HELD_OUT_SEED
from controlllm.data.sources import read_rows
from controlllm.errors import UserError
from controlllm.store import read_lineage

pytestmark = pytest.mark.usefixtures("store")


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def only(store: Path, stage: str) -> Path:
    (folder,) = [f for f in (store / stage).iterdir() if not f.name.startswith(".")]
    return folder


def test_nothing_measured_is_trained_on(recipe, store):
    pipeline.run(load_config(recipe), until="ingest")
    data = only(store, "ingest-data")
    trained = {row["messages"][0]["content"] for row in lines(data / "train" / "puzzles.jsonl")}
    held_out = lines(data / "probes" / "puzzles.jsonl")
    assert len(trained) > 30
    assert len(held_out) == 12
    assert not trained & {item["messages"][0]["content"] for item in held_out}


def test_held_out_questions_are_left_out_of_any_data(recipe, store, tmp_path):
    measured = list(read_rows(CATALOG["puzzles"].source, rows=12, seed=HELD_OUT_SEED))
    other = [{"question": f"What is {n}?", "answer": str(n)} for n in range(3)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured + other))
    fields = "{prompt: question, completion: answer}"
    own = f"{{name: own, source: {tmp_path}/own.jsonl, format: prompt_completion, fields: {fields}}}"
    pipeline.run(load_config(recipe, f"mix.datasets=[{own}]"), until="ingest")
    trained = lines(only(store, "ingest-data") / "train" / "own.jsonl")
    assert [row["messages"][0]["content"] for row in trained] == [row["question"] for row in other]


def test_rows_in_are_rows_out(recipe, store):
    pipeline.run(load_config(recipe, "pack.context_length=160"), until="prepare")
    stats = json.loads((only(store, "prepare") / "stats.json").read_text())
    trained = len(lines(only(store, "ingest-data") / "train" / "puzzles.jsonl"))
    assert stats["rows"] == trained == stats["documents"] + stats["validation_documents"] + stats["dropped_rows"]
    assert stats["dropped_rows"] > 0


def test_consolidated_is_trained(recipe, store):
    config = load_config(recipe)
    pipeline.run(config, until="consolidate")
    from safetensors.torch import load_file

    folder = only(store, "consolidate")
    model = AutoModelForCausalLM.from_pretrained(folder)
    saved = load_file(only(store, "train") / "trained.safetensors")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in saved.items())
    base = AutoModelForCausalLM.from_pretrained(only(store, "ingest-model"))
    assert torch.equal(model.model.layers[1].frozen.mlp.up_proj.weight, base.model.layers[1].mlp.up_proj.weight)
    assert not torch.equal(model.model.layers[1].expanded.mlp.up_proj.weight, base.model.layers[1].mlp.up_proj.weight)
    lineage = model.config.lineage
    assert lineage["base_content"] == read_lineage(only(store, "ingest-model"))["content"]
    assert lineage["base_model"] == Path(config.model.name).name
    assert lineage["data"]["datasets"] == ["puzzles"]
    assert lineage["code"]["train"]
    assert "/" not in json.dumps(lineage)
    assert {f.suffix for f in folder.iterdir()} <= {".safetensors", ".json", ".jinja"}
    assert AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize(("control", "architecture", "layers"), [
    ("{layout: stack, num_expanded: 2}", "LlamaForCausalLM", 6),
    ("{layout: hybrid, num_expanded: 2, interpolation: dlerp, divergence: cosine}", "ControlLlamaForCausalLM", 5),
    ("{num_expanded: 2, interpolation: moe, teacher: trajectory}", "ControlLlamaForCausalLM", 4),
])  # fmt: skip
def test_other_methods_run_through_every_stage(recipe, store, control, architecture, layers):
    pipeline.run(load_config(recipe, f"control={control}"), until="benchmark")
    model = AutoModelForCausalLM.from_pretrained(only(store, "consolidate"))
    assert type(model).__name__ == architecture
    assert len(model.model.layers) == layers


def test_full_fine_tuning_gives_the_plain_architecture(recipe, store):
    pipeline.run(load_config(recipe, "control=null"), until="consolidate")
    model = AutoModelForCausalLM.from_pretrained(only(store, "consolidate"))
    assert type(model).__name__ == "LlamaForCausalLM"
    trained = json.loads((only(store, "train") / "train.json").read_text())
    assert trained["trained_parameters"] == trained["total_parameters"]


def test_scores_are_what_the_model_gives(recipe, store):
    """lm-eval's loss of a probe = a plain forward pass over prompt and target."""
    from controlllm.benchmark import benchmark

    config = load_config(recipe, "benchmark.old=[mmlu, prose, code, chat, drift]")
    pipeline.run(config, until="ingest")
    base, data = only(store, "ingest-model"), only(store, "ingest-data")
    folder = benchmark(base, data, config.benchmark).path
    scores = json.loads((folder / "scores.json").read_text())["probes"]
    assert set(scores) == {"puzzles", "mmlu", "prose", "code", "chat", "drift"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    item = lines(folder / "items" / "chat.jsonl")[0]
    ids = tokenizer(item["prompt"] + item["target"] + "<|im_end|>", return_tensors="pt")["input_ids"]
    logits = model(ids).logits[0, :-1].log_softmax(-1)
    losses = -logits[range(len(logits)), ids[0, 1:]]
    assert item["loss"] == pytest.approx(losses[-item["tokens"] :].sum().item(), rel=1e-4)
    for name, score in scores.items():
        items = lines(folder / "items" / f"{name}.jsonl")
        assert len(items) == score["items"]
        assert score["metrics"]["loss"] == pytest.approx(
            sum(i["loss"] for i in items) / sum(i["tokens"] for i in items)
        )


def test_own_file_with_a_bad_row_is_named(recipe, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    own = f"mix.datasets=[{{name: own, source: {tmp_path}/own.jsonl, format: prompt_completion}}]"
    with pytest.raises(UserError, match=r"own\.jsonl row 2: field 'completion' is missing or null"):
        pipeline.run(load_config(recipe, own), until="ingest")


def test_every_recipe_loads():
    for file in Path("workflows/recipes").glob("*.yaml"):
        assert load_config(file).name == file.stem
