"""The plugin's registration, its names of tensors, and what the config says while vLLM counts attentions."""

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from controlllm import vllm_plugin
from controlllm.control.interpolation import STRATEGIES
from controlllm.control.model import control_config
from controlllm.control.settings import ControlSettings
from controlllm.fingerprint import PACKAGE

SCRIPT = """
from controlllm.vllm_plugin import register
from vllm import ModelRegistry
before = set(ModelRegistry.models)
register()
added = set(ModelRegistry.models) - before
register()
assert set(ModelRegistry.models) == before | added
assert {"ControlLlamaForCausalLM", "ControlQwen2ForCausalLM", "ControlMistralForCausalLM"} <= added
assert all(name.startswith("Control") for name in added)
classes = {name: ModelRegistry.models[name].class_name for name in added}
assert classes["ControlQwen3ForCausalLM"] == "ControlQwen3ForCausalLM"
assert classes["ControlGemma2ForCausalLM"] == "ControlForCausalLM"
native = ModelRegistry.models["ControlQwen3ForCausalLM"].load_model_cls()
assert native.__name__ == "ControlQwen3ForCausalLM"
assert native.__mro__[1].__name__ == "Qwen3ForCausalLM"
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_registering_twice_is_harmless() -> None:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, env=environment, timeout=300)


def test_attentions_are_counted_and_the_config_is_as_before() -> None:
    base = Qwen2Config(num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"])
    config = control_config(base, ControlSettings(sites=[1, 2]))
    before = config.to_dict()
    with vllm_plugin._attentions_as_layers(config):
        assert config.num_hidden_layers == 5
        assert config.layer_types[3:] == ["sliding_attention", "full_attention"]
    assert config.to_dict() == before


def test_a_family_without_kinds_of_layers_counts_attentions_too() -> None:
    config = control_config(LlamaConfig(num_hidden_layers=3), ControlSettings(sites=[0]))
    with vllm_plugin._attentions_as_layers(config):
        assert config.num_hidden_layers == 4
        assert getattr(config, "layer_types", None) is None


def test_only_the_model_class_is_made_on_demand() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = vllm_plugin.Other


@pytest.mark.parametrize(("config", "native"), [
    (LlamaConfig(head_dim=48), True),
    (Qwen2Config(num_hidden_layers=2), True),
    (Qwen2Config(num_hidden_layers=2, head_dim=48), False),
    (Qwen3Config(num_hidden_layers=2, head_dim=48), True),
    (Qwen3Config(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"]), False),
    (Qwen3Config(num_hidden_layers=2, layer_types=["sliding_attention"] * 2), True),
])  # fmt: skip
def test_what_the_layers_of_vllm_cannot_run_goes_through_transformers(config: Any, native: bool) -> None:
    assert vllm_plugin._has_native_layers(control_config(config, ControlSettings(sites=[1]))) == native


def test_tensors_are_found_by_both_names() -> None:
    settings = ControlSettings(sites=[0, 1, 2, 3], layout="hybrid")  # copies are layers 1 and 4, pairs 2 and 5
    names = ["embed_tokens.weight", "layers.1.mlp.up_proj.weight", "layers.2.mlp.up_proj.weight",
             "layers.5.frozen.mlp.up_proj.weight", "layers.5.expanded.mlp.up_proj.weight",
             "layers.5.interpolation.alpha_logit"]  # fmt: skip
    weights = [(f"model.{name}", torch.zeros(1)) for name in names]
    found = vllm_plugin._into_copies(vllm_plugin._named_alike(weights, settings), settings)
    assert [name.removeprefix("model.") for name, _ in found] == [
        "embed_tokens.weight", "layers.1.copy.mlp.up_proj.weight", "layers.2.frozen.mlp.up_proj.weight", *names[3:]
    ]  # fmt: skip


@pytest.mark.parametrize(("given", "said"), [
    (["a", "b", "x"], "tensor x is none of the model"),
    (["a", "a"], "tensor a is there twice"),
    (["b"], r"tensor a is missing \(2 in all\)"),
])  # fmt: skip
def test_a_checkpoint_is_whole(given: list[str], said: str) -> None:
    expected = {"a", "b", "c", "lm_head.weight"}
    with pytest.raises(ValueError, match=said):
        list(vllm_plugin._checked([(name, torch.zeros(1)) for name in given], expected, tied=True))


def test_relaxed_norms_of_vllm_add_the_residual() -> None:
    relaxed = vllm_plugin._NativeRelaxedNorm(torch.nn.LayerNorm(4), 0.25)
    hidden, residual = torch.randn(2, 3, 4)
    normed, total = relaxed(hidden, residual)
    assert torch.equal(total, hidden + residual)
    assert torch.equal(normed, relaxed(total))
    assert torch.allclose(normed, 0.25 * total + 0.75 * torch.nn.functional.layer_norm(total, (4,)))


class _Times(torch.nn.Module):
    """A layer as vLLM's, which changes in place what it is given."""

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, _positions: torch.Tensor, hidden: torch.Tensor, residual: None) -> Any:
        assert residual is None
        kept = hidden.clone()
        return hidden.mul_(self.factor - 1), kept


@pytest.mark.parametrize("ends_stage", [True, False])
def test_the_dial_is_exact_at_its_ends(ends_stage: bool) -> None:
    settings = ControlSettings(sites=[0], interpolation="none")
    parts = (_Times(3), _Times(5), STRATEGIES["none"](4), settings)
    pair = vllm_plugin._NativePair(*parts, ends_stage=ends_stage)
    inputs, residual = torch.randn(2, 3, 4)
    for scale, factor in {0.0: 3, 1.0: 5}.items():
        vllm_plugin.set_alpha_scale(torch.nn.ModuleList([pair]), scale)
        hidden, handed_on = pair(torch.arange(3), inputs, residual)
        assert torch.equal(hidden, factor * (inputs + residual))
        assert (handed_on is not None) == ends_stage


def test_a_model_without_twins_has_no_dial() -> None:
    with pytest.raises(ValueError, match="alpha_scale: Linear has no twins"):
        vllm_plugin.set_alpha_scale(torch.nn.Linear(1, 1), 0.5)
