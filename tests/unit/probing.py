"""Tiny models to look into: a base, and expanded ones of which some twins were trained."""

import json

import pyarrow.parquet as pq
import torch
from conftest import tiny_config
from transformers import LlamaForCausalLM

from controlllm.control.expand import control_blocks
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings


def base_model(**changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(**changes)).eval()
    model.set_attn_implementation("eager")
    return model


def expanded(*, moved=(), **settings):
    """Sites 1 and 3, the twins of `moved` trained."""
    model = expand_model(base_model(), ControlSettings(**{"sites": [1, 3]} | settings)).eval()
    torch.manual_seed(2)
    for index in moved:
        for parameter in control_blocks(model)[index].expanded.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read(folder):
    rows = pq.read_table(folder / "probe.parquet").to_pylist()
    return json.loads((folder / "probe.json").read_text()), rows
