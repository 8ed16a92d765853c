"""The plugin's registration, and what the config says while vLLM counts attentions."""

import importlib.util
import os
import subprocess
import sys

import pytest
from transformers import LlamaConfig, Qwen2Config

from controlllm import vllm_plugin
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
