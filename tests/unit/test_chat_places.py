"""A checkpoint of any stage answers as what comes out at the end does; and what cannot be opened is one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from chatting import generated, saved, talker, tuned_talker
from delivering import deliver
from safetensors.torch import load_file, save_file

import controlllm
from controlllm.chat.about import describe
from controlllm.chat.loading import load_place
from controlllm.chat.opening import Wish, open_base, open_engine
from controlllm.chat.places import Adapter, Model, Trained, find_place
from controlllm.cli import main
from controlllm.errors import UserError
from controlllm.tuned import load_tuned

IDS = [5, 77, 130, 9]
ROW = torch.tensor([IDS])


def logits(target, base=None):
    place = find_place(Path(target), base)
    with torch.inference_mode():
        return load_place(place, dtype="float32").model.eval()(ROW).logits


def trained_run(recipe, tmp_path, *changes):
    """A training whose checkpoints are kept, and its consolidated model."""
    kept = tmp_path / "kept"
    assert main(["consolidate", str(recipe), f"train.checkpoint.folder={kept}", "train.lr=0.05", *changes]) == 0
    (model,) = (f for f in (tmp_path / "cache" / "consolidate").iterdir() if f.is_dir())
    return kept, model


def test_a_training_under_way_and_its_end(recipe, store, tmp_path, capsys):
    kept, model = trained_run(recipe, tmp_path)
    capsys.readouterr()
    end = controlllm.load(model).eval()(ROW).logits
    torch.testing.assert_close(logits(kept), end)
    assert [path.name for path in sorted(kept.iterdir())] == ["step-00000002", "step-00000004"]
    torch.testing.assert_close(logits(kept / "step-00000004"), end)
    assert not torch.allclose(logits(kept / "step-00000002"), end)
    (training,) = (f for f in (store / "train").iterdir() if f.is_dir())
    torch.testing.assert_close(logits(training), end)
    under_way = store / "train" / ".key.partial"
    shutil.copytree(kept, under_way / "checkpoints")
    (under_way / "checkpoints" / ".step-00000006.partial").mkdir()  # it is being written
    place = find_place(under_way, None)
    assert isinstance(place, Trained)
    assert place.step == 4
    assert describe(place) == "checkpoints/step-00000004 · llama · Control LLM (concat-lerp, twins), step 4"
    assert (under_way / "checkpoints" / ".step-00000006.partial").exists()
    damaged = under_way / "checkpoints" / "step-00000004" / "manifest.json"
    damaged.write_text("{}")
    assert find_place(under_way, None).step == 2
    assert "half a checkpoint; choose another, or copy it again: passed over" in " ".join(
        capsys.readouterr().err.split()
    )
    with pytest.raises(UserError, match=r"step-00000004: manifest.json was altered.*: half a checkpoint"):
        find_place(damaged.parent, None)
    base = open_base(place, open_engine(find_place(kept, None), Wish()), Wish(), base=None)
    assert base.holds_base


@pytest.mark.parametrize(("holds_base", "changes"), [
    (False, ["control=null", "lora={rank: 4, alpha: 64}"]),
    (False, ["control=null"]),
    (True, ["control={num_expanded: 2, twin: lora}", "lora={rank: 4}"]),
    (True, ["control=null", "prompt={num_virtual_tokens: 3}"]),
    (False, ["control=null", "lora={rank: 4}", "quantization={kind: nf4}"]),
], ids=["lora", "full", "twins of lora", "prompt", "4 bits"])  # fmt: skip
def test_checkpoints_of_other_methods(recipe, store, tmp_path, holds_base, changes):
    kept, model = trained_run(recipe, tmp_path, *changes)
    end = load_tuned(model, dtype="float32").eval()(ROW).logits
    torch.testing.assert_close(logits(kept), end, rtol=1e-3, atol=1e-3)
    place = find_place(kept, None)
    engine = open_engine(place, Wish(dtype="float32"))
    base = open_base(place, engine, Wish(), base=None)
    assert (base is engine) == holds_base
    if not holds_base:
        torch.testing.assert_close(base.model(ROW).logits, load_tuned(place.base, dtype="float32").eval()(ROW).logits)


def test_an_adapter_by_itself(tiny_base, store, tmp_path):
    folder, _ = deliver(tiny_base, tmp_path, lora={"rank": 4})
    whole = load_tuned(folder).eval()(ROW).logits
    place = find_place(folder / "adapter", tiny_base)
    assert isinstance(place, Adapter)
    torch.testing.assert_close(logits(folder / "adapter", tiny_base), whole, rtol=1e-4, atol=1e-4)
    assert describe(place).endswith(f"adapter · llama · LORA on {tiny_base.parent.name}/{tiny_base.name}")
    with pytest.raises(
        UserError, match=r"is an adapter, and its base model .* is not here; give its folder with --base"
    ):
        find_place(folder / "adapter", None)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_by_themselves(kind, tiny_base, store, tmp_path):
    folder, _ = deliver(tiny_base, tmp_path, prompt={"kind": kind, "num_virtual_tokens": 3})
    whole = load_tuned(folder).eval()(ROW).logits
    torch.testing.assert_close(logits(folder), whole)
    torch.testing.assert_close(logits(folder / "adapter", tiny_base), whole)
    with pytest.raises(UserError, match=r"--backend vllm: .* adapter beside its weights; use --backend transformers"):
        open_engine(find_place(folder, None), Wish("vllm"))


def test_runs_folders_and_what_is_said_of_them(tokenizer, tmp_path, capsys):
    run = tmp_path / "runs" / "mine"
    saved(tuned_talker(layout="hybrid", interpolation="dlerp"), tokenizer, run / "model")
    place = find_place(run, None)
    assert place == Model(run / "model")
    assert describe(place) == "mine/model · llama · Control LLM (hybrid-dlerp, sites 1, 3)"
    (run / "model").rename(run / "refused")
    assert find_place(run, None) == Model(run / "refused")
    assert "its gate refused the newest model" in capsys.readouterr().err
    plain = saved(talker(), tokenizer, tmp_path / "plain")
    assert describe(find_place(plain, None)).endswith("plain · llama · plain model")


def test_a_dialled_checkpoint_begins_where_it_stands(tokenizer, tmp_path):
    folder = saved(tuned_talker(), tokenizer, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["control"]["alpha_scale"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    engine = open_engine(find_place(folder, None), Wish())
    assert engine.alpha == 0.5
    torch.testing.assert_close(engine.model(ROW).logits, controlllm.load(folder, alpha_scale=0.5).eval()(ROW).logits)


def test_the_base_is_found_by_lineage(tiny_base, store, tmp_path, recipe):
    """Of a model that does not hold it, in the store that it came from."""
    _, model = trained_run(recipe, tmp_path, "control=null")
    engine = open_engine(find_place(model, None), Wish())
    base = open_base(find_place(model, None), engine, Wish(), base=None)
    assert base is not engine
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    from chatting import request, tokens

    assert tokens(base.answer(request(IDS))) == generated(real, IDS)


def small(tokenizer, folder):
    return saved(talker(), tokenizer, folder)


def without(name):
    def change(folder):
        (folder / name).unlink()

    return change


def without_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


def with_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"lm_head.weight": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def without_tokenizer(folder):
    for file in (*folder.glob("tokenizer*"), *folder.glob("*.jinja"), *folder.glob("special*")):
        file.unlink()


def another_tokenizer(folder):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(folder)
    other.add_tokens([f"word{i}" for i in range(9)])
    other.save_pretrained(folder)


def broken_config(folder):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(("change", "says"), [
    (without("model.safetensors"), "has no weights (*.safetensors)"),
    (without_tensor, "tensor 'model.layers.1.mlp.up_proj.weight' is missing"),
    (cut, "model.safetensors: no whole safetensors file"),
    (with_index, "model-00002-of-00002.safetensors: is missing, which model.safetensors.index.json names"),
    (without_tokenizer, "its tokenizer cannot be loaded"),
    (another_tokenizer, "its tokenizer has 267 tokens and the model 258 embeddings: it is another model's"),
    (broken_config, "config.json: not valid JSON"),
    (without("config.json"), "is no checkpoint; give a model's folder"),
])  # fmt: skip
def test_half_a_checkpoint_is_one_line(change, says, tokenizer, tmp_path, capsys):
    folder = small(tokenizer, tmp_path / "model")
    change(folder)
    assert main(["chat", str(folder), "--prompt", "x"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert says in line


@pytest.mark.parametrize(("arguments", "says"), [
    (["nowhere"], "nowhere: no such folder"),
    (["moedl"], "moedl: no such folder; did you mean model?"),
    (["model/config.json"], "is a file; give the checkpoint's folder"),
    (["model", "--alpha", "2"], "alpha: 2 is not within 0"),
    (["model", "--alpha", "0.5"], "no dial"),
    (["model", "--temperature", "-1"], "temperature: -1"),
    (["model", "--backend", "llama.cpp"], "--backend: there is no 'llama.cpp'; there are transformers and vllm"),
    (["model", "--dtype", "int4"], "--dtype: 'int4' is none of"),
    (["model", "--compare"], "does not hold its base; give the base's folder with --base"),
    (["model", "--base", "nowhere"], "--base nowhere: has no config.json"),
    (["model", "--compare", "--base", "other"], "--base other: vocab_size is 300, but 258 in model: not its base"),
    (["model", "--prompt", " "], "--prompt: is empty"),
])  # fmt: skip
def test_what_is_asked_wrongly_is_one_line(arguments, says, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small(tokenizer, Path("model"))
    saved(talker(vocab_size=300), tokenizer, Path("other"))
    prompt = [] if "--prompt" in arguments else ["--prompt", "x"]
    assert main(["chat", *arguments, *prompt]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert says in line


def test_no_template_and_a_system_message(tokenizer, tmp_path, capsys):
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    folder = saved(talker(), plain, tmp_path / "model")
    assert main(["chat", str(folder), "--prompt", "x", "--system", "y"]) == 1
    assert "--system: the tokenizer has no chat template" in capsys.readouterr().err
    assert main(["chat", str(folder), "--prompt", "x", "--max-new-tokens", "4"]) == 0
    assert "the model goes on with your text as it stands" in capsys.readouterr().err


def test_another_base_is_said(recipe, store, tmp_path, tokenizer, capsys):
    kept, _ = trained_run(recipe, tmp_path)
    other = saved(talker(tie_word_embeddings=True), tokenizer, tmp_path / "other")
    assert main(["chat", str(kept), "--base", str(other), "--prompt", "x", "--max-new-tokens", "2"]) == 0
    assert "is not the very folder that the run began with" in capsys.readouterr().err
    wrong = saved(talker(hidden_size=32, tie_word_embeddings=True), tokenizer, tmp_path / "wrong")
    assert main(["chat", str(kept), "--base", str(wrong), "--prompt", "x"]) == 1
    assert "does not fit the base" in capsys.readouterr().err.splitlines()[-1]
    shutil.rmtree(store / "ingest-model")
    assert main(["chat", str(kept), "--prompt", "x"]) == 1
    assert "name its folder with --base" in capsys.readouterr().err.splitlines()[-1]
