"""What a prior checkpoint is told to be, and one line for each that is not whole."""

import json
from pathlib import Path

import pytest
import torch
from prior_checkpoints import prior_checkpoint
from safetensors.torch import load_file, save_file

from controlllm.control import reference
from controlllm.control.reference_config import base_family
from controlllm.errors import UserError


@pytest.mark.parametrize(("values", "names", "asked", "found"), [
    ({"mlp_bias": False, "_name_or_path": "mistral-to-be"}, [], None, "llama"),
    ({"mlp_bias": False}, [], "mistral", "mistral"),
    ({"max_window_layers": 28, "sliding_window": 4096}, [], None, "qwen2"),
    ({}, ["model.layers.0.self_attn.q_proj.bias"], None, "qwen2"),
    ({"sliding_window": None}, [], None, "mistral"),
    ({"model_type": "llama", "sliding_window": None}, [], None, "llama"),
    ({"expansion": {"expanded_from": "/a/Meta-Llama-3.1-8B-Instruct"}}, [], None, "llama"),
    ({"trained_from": "/a/Qwen2.5-7B/"}, [], None, "qwen2"),
    ({"max_window_layers": 28, "trained_from": "Qwen3-8B"}, ["a.self_attn.q_norm.weight"], None, "qwen3"),
])  # fmt: skip
def test_base_family(values, names, asked, found):
    assert base_family({"model_type": "causallmexpansion"} | values, names, asked=asked, file=Path("f")) == found


def edit(folder, *, expansion=None, **values):
    config = json.loads((folder / "config.json").read_text())
    config["expansion"] |= expansion or {}
    (folder / "config.json").write_text(json.dumps(config | values))


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-4])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(folder, **places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


Q = "model.layers.1.expanded_layer.self_attn.q_proj.weight"
FACTOR = "model.layers.3.interpolation_factor"
WRONG = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: not found"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: no JSON"),
    "no expansion": (lambda f: (f / "config.json").write_text("{}"), "config.json: has no `expansion`"),
    "layout": (lambda f: edit(f, expansion={"expand_type": "wide"}), "expand_type is wide; .* concat, stack, hybrid"),
    "method": (lambda f: edit(f, expansion={"merge_method": "mean"}), "merge_method is mean; it must be one of lerp"),
    "loss": (lambda f: edit(f, expansion={"interpolation_loss_type": "l1"}), "interpolation_loss_type is l1; .* mse"),
    "weight": (lambda f: edit(f, expansion={"interpolation_loss_alpha": -2}), "loss_alpha is -2; it must be -1 or"),
    "relaxation": (lambda f: edit(f, expansion={"interpolation_norm_alpha": 2}), "norm_alpha is 2.0; it must be -1 or"),
    "no factor": (
        lambda f: edit(f, expansion={"merge_method": "slerp", "interpolation_factor": None}),
        "must be a num",
    ),
    "frozen": (lambda f: edit(f, expansion={"freezed_layers": [0, 4]}), "freezed_layers is .*; .* layers from 0 to 3"),
    "all frozen": (lambda f: edit(f, expansion={"freezed_layers": [0, 1, 2, 3]}), "freezed_layers is"),
    "layer 0": (lambda f: edit(f, expansion={"freezed_layers": [1, 2, 3], "expand_type": "stack"}), "layout stack"),
    "count": (lambda f: edit(f, expansion={"num_exp_layers": 3}), "num_exp_layers is 3; it must be 2"),
    "layers": (lambda f: edit(f, num_hidden_layers="4"), "num_hidden_layers is 4"),
    "family": (
        lambda f: edit(f, vocab_size=60),
        r"embed_tokens.weight has shape \[61,",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no .*.safetensors"),
    "pickle": (pickled, "pytorch_model.bin: pickled weights"),
    "cut": (cut, "model.safetensors: no whole safetensors file .its tensors end"),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"\1"), "no whole safetensors file"),
    "not in index": (lambda f: index(f, a="model-1.safetensors"), "model-1.safetensors: not found, but .*index.json"),
    "index outside": (lambda f: index(f, a="../model.safetensors"), "index.json: has no weight_map"),
    "missing": (lambda f: rewrite(f, lambda w: w.pop(Q)), f"tensor {Q} is missing"),
    "unexpected": (lambda f: rewrite(f, lambda w: w.update(x=torch.ones(1))), "model.safetensors: tensor x is not of"),
    "shape": (lambda f: rewrite(f, lambda w: w.update({FACTOR: torch.ones(2)})), rf"{FACTOR} has shape \[2\].*\[1\]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_source_is_one_line_and_writes_nothing(tmp_path, kind):
    source = prior_checkpoint(tmp_path / "prior", method="lerp")
    change, says = WRONG[kind]
    change(source)
    with pytest.raises(UserError, match=says) as caught:
        reference.import_reference(source, tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["prior"]


def test_wrong_family_and_target(tmp_path):
    source = prior_checkpoint(tmp_path / "prior", method="lerp")
    with pytest.raises(UserError, match="exists already"):
        reference.import_reference(source, source)
    with pytest.raises(UserError, match="--base-family: nothing is no causal LM"):
        reference.load(source, base_family="nothing")
    with pytest.raises(UserError, match=r"q_proj.bias is missing; is it a qwen2 \(--base-family\)"):
        reference.load(source, base_family="qwen2")
    config = json.loads((source / "config.json").read_text())
    for key in ("mlp_bias", "pretraining_tp"):
        del config[key]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not tell the base architecture; name it with --base-family"):
        reference.load(source)
