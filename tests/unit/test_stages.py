"""The stages without Flyte, on a tiny model: what they write is whole and honest."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import controlllm  # noqa: F401
from controlllm import pipeline
from controlllm.benchmark.items import read_items
from controlllm.config import load_config
from controlllm.data.catalog import CATALOG
from controlllm.data.probes import HELD_OUT_SEED
from controlllm.data.shelf import Shelf
from controlllm.data.sources import read_rows
from controlllm.errors import UserError
from controlllm.store import read_lineage

KINDS = ("train", "validation")
pytestmark = pytest.mark.usefixtures("store")


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def only(store: Path, stage: str) -> Path:
    (folder,) = [f for f in (store / stage).iterdir() if not f.name.startswith(".")]
    return folder


def questions(store: Path, dataset: str) -> set[str]:
    """The first words of what a prepared dataset asks, out of its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(only(store, "ingest-model"))
    shelf = Shelf.open(only(store, "prepare") / dataset)
    rows = [shelf.read(u, r, k) for u in range(shelf.units) for k in KINDS for r in range(shelf.rows_of(u, k))]
    found = {text for row in rows for text in tokenizer.decode(row["input_ids"]).split("<|im_start|>user\n")[1:]}
    return {text.split("<|im_end|>")[0] for text in found}


def test_nothing_measured_is_trained_on(recipe, store):
    pipeline.run(load_config(recipe, "pack.context_length=1024"), until="prepare")
    trained = questions(store, "puzzles")
    held_out = lines(only(store, "ingest-data") / "probes" / "puzzles.jsonl")
    assert len(trained) > 30
    assert len(held_out) == 12
    assert not trained & {item["messages"][0]["content"] for item in held_out}


@pytest.mark.parametrize("mode", ["exact", "ngram"])
def test_held_out_questions_are_left_out_of_any_data(recipe, store, tmp_path, mode):
    measured = list(read_rows(CATALOG["puzzles"].source, rows=12, seed=HELD_OUT_SEED))
    other = [{"question": f"What is {n}?", "answer": str(n)} for n in range(3)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured + other))
    fields = "{prompt: question, completion: answer}"
    own = f"{{name: own, source: {tmp_path}/own.jsonl, format: prompt_completion, fields: {fields}}}"
    changes = (f"mix.datasets=[{own}]", f"mix.decontaminate={mode}", "pack.validation_fraction=0", "validation=null")
    pipeline.run(load_config(recipe, *changes), until="prepare")
    assert questions(store, "own") == {row["question"] for row in other}
    assert stats(store)["datasets"]["own"]["filtered"] == {"measured": len(measured)}


def stats(store: Path) -> dict:
    return stats_of(only(store, "prepare"))


def stats_of(folder: Path) -> dict:
    return json.loads((folder / "stats.json").read_text())


def test_rows_in_are_rows_out(recipe, store):
    pipeline.run(load_config(recipe, "pack.context_length=160"), until="prepare")
    made = stats(store)
    assert made["rows"] == 40 == made["documents"] + made["validation_documents"] + made["filtered_rows"]
    assert made["datasets"]["puzzles"]["filtered"]["overlong"] > 0


def test_streaming_trains_on_the_same_rows_in_the_same_order(recipe, store):
    changes = ("mix.datasets.0.weight=1", "pack.unit_rows=16")
    pipeline.run(load_config(recipe, *changes), until="train")
    shards = sorted(f.name for f in (store / "shards").iterdir())
    before = {f for f in (store / "train").iterdir() if f.is_dir()}
    pipeline.run(load_config(recipe, *changes, "pack.streaming=true"), until="train")
    (streamed,) = {f for f in (store / "train").iterdir() if f.is_dir()} - before
    (waited,) = before
    assert sorted(f.name for f in (store / "shards").iterdir()) == shards
    assert (waited / "trained.safetensors").read_bytes() == (streamed / "trained.safetensors").read_bytes()
    losses = [[row.get("loss") for row in lines(folder / "metrics.jsonl")] for folder in (waited, streamed)]
    assert losses[0] == losses[1]
    assert json.loads((streamed / "stats.json").read_text())["rows"] == 40


def test_streaming_makes_the_shards_itself_and_says_what_goes_wrong(recipe, store, tmp_path):
    pipeline.run(load_config(recipe, "pack.streaming=true", "mix.datasets.0.weight=1"), until="train")
    assert list((store / "shards").glob("*.arrow"))
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    own = f"mix.datasets=[{{name: own, source: {tmp_path}/own.jsonl, format: prompt_completion}}]"
    with pytest.raises(UserError, match=r"own\.jsonl:2: field 'completion'"):
        pipeline.run(load_config(recipe, own, "pack.streaming=true", "validation=null"), until="train")


def test_a_maker_that_is_killed_ends_the_training_that_waits_for_it(recipe, store, monkeypatch):
    """And the same command goes on afterwards."""
    changes = ("pack.streaming=true", "mix.datasets.0.weight=1")
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr("controlllm.data.streaming.MAKER", ["-c", killed])
    with pytest.raises(UserError, match="the process that makes the shards ended with -9"):
        pipeline.run(load_config(recipe, *changes), until="train")
    monkeypatch.undo()
    monkeypatch.setenv("CONTROLLLM_CACHE", str(store))
    pipeline.run(load_config(recipe, *changes), until="train")
    assert stats_of(only(store, "train"))["rows"] == 40


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

    config = load_config(recipe, "benchmark.old=[mmlu-dev, prose, python, chat, drift]")
    pipeline.run(config, until="ingest")
    base, data = only(store, "ingest-model"), only(store, "ingest-data")
    folder = benchmark(base, data, config.benchmark).path
    scores = json.loads((folder / "scores.json").read_text())["tasks"]
    assert set(scores) == {"puzzles", "mmlu-dev", "prose", "python", "chat", "drift"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    item = read_items(folder, "chat")[0]
    ids = tokenizer(item["prompt"] + item["target"] + "<|im_end|>", return_tensors="pt")["input_ids"]
    logits = model(ids).logits[0, :-1].log_softmax(-1)
    losses = -logits[range(len(logits)), ids[0, 1:]]
    assert item["loss"] == pytest.approx(losses[-item["tokens"] :].sum().item(), rel=1e-4)
    for name, score in scores.items():
        items = read_items(folder, name)
        assert len(items) == score["items"]
        assert score["metrics"]["loss"] == pytest.approx(
            sum(i["loss"] for i in items) / sum(i["tokens"] for i in items)
        )


def test_own_file_with_a_bad_row_is_named(recipe, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    own = f"mix.datasets=[{{name: own, source: {tmp_path}/own.jsonl, format: prompt_completion}}]"
    with pytest.raises(UserError, match=r"own\.jsonl:2: field 'completion'.*1 of 2 rows cannot be used"):
        pipeline.run(load_config(recipe, own), until="prepare")


def test_every_recipe_loads():
    for file in Path("workflows/recipes").glob("*.yaml"):
        assert load_config(file).name == file.stem
