"""A pair's frozen tensors are found by the base's names, too: transformers' loader and our own."""

from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from controlllm.config import ControlConfig, ModelConfig
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.control.spelling import base_name, pair_names
from controlllm.train.weight_files import find_tensors
from controlllm.train.weights import _plain


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=99, n_positions=64)).eval()


def expanded(model):
    config = ControlConfig(num_expanded=2, sites="top", interpolation="dlerp")
    made = expand_model(model, ControlSettings.resolve(config, num_layers=model.config.num_hidden_layers))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("make", [*(partial(tiny, family) for family in FAMILIES), gpt2])
def test_both_spellings_are_one_model(make, tmp_path):
    model = expanded(make())
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    spelled = {base_name(name, pair_names(model)): tensor for name, tensor in names.items()}
    assert len(spelled.keys() - names.keys()) >= 8
    save_file(spelled, tmp_path / "model.safetensors", {"format": "pt"})
    both: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    again, found = both
    assert not any(found.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    decoder = AutoModel.from_pretrained(tmp_path)
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(decoder.state_dict()[name], tensor), name
    plain = _plain(tmp_path, ModelConfig(name="x", attention="eager"), torch.float32)
    assert find_tensors(plain, tmp_path).keys() >= names.keys()
    again.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == names.keys()
