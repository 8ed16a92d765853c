"""The tuned model is written tensor by tensor as loading and saving would write it."""

import json
import shutil

import pytest
import torch
from delivering import deliver
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from controlllm.config import ExportConfig, Method
from controlllm.consolidate import consolidate, writing
from controlllm.consolidate.companions import end_of_turn
from controlllm.control.fold import fold_model, measure_alphas
from controlllm.control.spelling import base_name, pair_names
from controlllm.distance import batches, read_documents
from controlllm.errors import UserError
from controlllm.fingerprint import hash_file
from controlllm.store import read_lineage

METHODS = {
    "concat": {"control": {"num_expanded": 2, "interpolation": "dlerp"}},
    "hybrid": {"control": {"num_expanded": 2, "layout": "hybrid", "norm_relaxation": "learned"}},
    "stack": {"control": {"num_expanded": 2, "layout": "stack"}},
    "still": {"control": {"num_expanded": 2, "train_alpha": False}},
    "partial": {"partial": {"num_blocks": 2}},
    "full": {},
}


@pytest.fixture
def sharded_base(tiny_base, tmp_path):
    """The base in several files."""
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(folder, max_shard_size="150KB")
    return folder


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        part = load_file(file)
        assert not part.keys() & found.keys()
        found |= part
    return found


@pytest.mark.parametrize("method", METHODS)
def test_as_loading_and_saving_write_it(sharded_base, tmp_path, store, method):
    folder, model = deliver(sharded_base, tmp_path, export={"frozen": "copy", "max_shard_gb": 3e-4}, **METHODS[method])
    model.save_pretrained(tmp_path / "saved")
    want, found = tensors(tmp_path / "saved"), tensors(folder)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())
    ours, theirs = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "saved"))
    assert {k: v for k, v in ours.items() if k not in ("lineage", "use_cache")} == {
        k: v for k, v in theirs.items() if k != "use_cache"
    }
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == want.keys()
    assert max(file.stat().st_size for file in folder.glob("*.safetensors")) < 400_000


@pytest.mark.parametrize("method", METHODS)
def test_files_of_the_base_are_linked(sharded_base, tmp_path, store, method):
    before = {file.name: hash_file(file) for file in sharded_base.iterdir()}
    folder, model = deliver(sharded_base, tmp_path, **METHODS[method])
    shared = {f.stat().st_ino for f in sharded_base.glob("*.safetensors")}
    linked = [f for f in folder.glob("*.safetensors") if f.stat().st_ino in shared]
    assert len(linked) == len(shared) if method in ("concat", "still") else (not linked) == (method == "full")
    assert not any(file.is_symlink() for file in folder.rglob("*"))
    again, base_names = AutoModelForCausalLM.from_pretrained(folder), pair_names(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    again.save_pretrained(tmp_path / "saved")
    found = {base_name(name, base_names) for name in tensors(tmp_path / "saved")}
    assert {base_name(name, base_names) for name in tensors(folder)} == found
    shutil.rmtree(folder)
    assert {file.name: hash_file(file) for file in sharded_base.iterdir()} == before


def test_where_nothing_can_be_linked_the_same_files_are_copied(sharded_base, tmp_path, store, monkeypatch, capsys):
    linked, _ = deliver(sharded_base, tmp_path, **METHODS["concat"])

    def refuse(*_paths):
        raise OSError(18, "Invalid cross-device link")

    content = read_lineage(linked)["content"]
    shutil.rmtree(linked)
    monkeypatch.setattr(writing.os, "link", refuse)
    (trained,) = (store / "train").glob("[!.]*")
    again = consolidate(sharded_base, trained, Method.model_validate(METHODS["concat"])).path
    assert read_lineage(again)["content"] == content
    assert all(file.stat().st_nlink == 1 for file in again.iterdir())
    assert "cannot be linked (Invalid cross-device link)" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "base"])
def test_dtypes(tiny_base, tmp_path, store, dtype):
    base = tmp_path / "halved"
    shutil.copytree(tiny_base, base)
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).save_pretrained(base)
    method = {"control": METHODS["concat"]["control"] | {"train_alpha": False}}
    folder, model = deliver(base, tmp_path, export={"dtype": dtype}, **method)
    found, chosen = tensors(folder), torch.float32 if dtype == "float32" else torch.bfloat16
    assert {t.dtype for name, t in found.items() if "expanded" in name} == {chosen}
    assert {t.dtype for name, t in found.items() if "expanded" not in name and "interp" not in name} == {torch.bfloat16}
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype == chosen
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(chosen)), name
    assert [file.stat().st_nlink for file in sorted(folder.glob("*.safetensors"))] == [2, 1]


@pytest.mark.parametrize(("method", "alpha"), [("still", "mean"), ("still", 0.25), ("concat", 0.3)])
def test_folded(tiny_base, tmp_path, store, method, alpha):
    folder, model = deliver(tiny_base, tmp_path, export={"form": "folded", "alpha": alpha}, **METHODS[method])
    alphas = measure_alphas(model, []) if alpha == "mean" else {1: alpha, 3: alpha}
    want, plain = fold_model(model, alphas), AutoModelForCausalLM.from_pretrained(folder)
    assert type(plain) is LlamaForCausalLM
    for name, tensor in want.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], tensor, rtol=2e-7, atol=0)
    values = json.loads((folder / "config.json").read_text())
    assert (values["model_type"], "control" in values) == ("llama", False)
    assert values["lineage"]["folded"][0]["alphas"] == {str(site): one for site, one in alphas.items()}


def test_what_depends_on_the_token_is_measured(tiny_base, tmp_path, store):
    folder, model = deliver(tiny_base, tmp_path, export={"form": "folded"}, **METHODS["concat"])
    documents = read_documents(None, AutoTokenizer.from_pretrained(tiny_base))[0::2]
    want = measure_alphas(model, (inputs for _, inputs in batches(documents, "cpu", lambda done, note="": None)))
    values = json.loads((folder / "config.json").read_text())["lineage"]["folded"][0]["alphas"]
    assert values == {str(site): pytest.approx(alpha) for site, alpha in want.items()}


def test_adapters_of_twins_fold_too(tiny_base, tmp_path, store):
    method = {"control": {"num_expanded": 2, "twin": "lora"}, "lora": {"rank": 2}}
    folder, _ = deliver(tiny_base, tmp_path, export={"form": "folded", "alpha": 0.5, "dtype": "bfloat16"}, **method)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert (type(plain), plain.dtype) == (LlamaForCausalLM, torch.bfloat16)


def test_generation_stops_where_an_answer_ends(tiny_base, tmp_path, store):
    folder, _ = deliver(tiny_base, tmp_path, **METHODS["partial"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id == 1
    tokenizer.eos_token = "a"
    tokenizer.save_pretrained(tmp_path / "other")
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    shutil.copytree(tmp_path / "other", base, dirs_exist_ok=True)
    (tmp_path / "second").mkdir()
    folder, _ = deliver(base, tmp_path / "second", **METHODS["partial"])
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [1, tokenizer.eos_token_id]


def test_tensors_of_another_run_are_named(tiny_base, tmp_path, store):
    deliver(tiny_base, tmp_path, **METHODS["concat"])
    (trained,) = (store / "train").glob("[!.]*")
    for method, says in [
        ({"control": {"num_expanded": 4}}, "is of another run: tensor 'model.layers.0.expanded"),
        ({"partial": {"num_blocks": 1}}, "is of another run: tensor 'model.layers.1.expanded"),
    ]:
        with pytest.raises(UserError, match=says):
            consolidate(tiny_base, trained, Method.model_validate(method), ExportConfig())
    assert len(list((store / "consolidate").glob("[!.]*"))) == 1


def test_shards_hold_what_they_may():
    class Sized:
        def __init__(self, size):
            self.size, self.dtype = size, "F32"

    sizes = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 5}
    found = writing.split({name: Sized(size) for name, size in sizes.items()}, 6)  # type: ignore[arg-type]
    assert [list(shard) for shard in found] == [["a", "b"], ["c"], ["d", "e"]]
