"""The model that is trained: the base, expanded and frozen as the recipe says."""

from pathlib import Path
from typing import Any

import torch

from controlllm.config import ControlConfig, ModelConfig
from controlllm.errors import UserError
from controlllm.train import attention


def load_model(base: Path, model: ModelConfig, control: ControlConfig | None) -> Any:
    """The base model with twins (control) or wholly trainable (none), in training mode.

    Raises UserError when the sites do not fit the model.
    """
    from transformers import AutoModelForCausalLM

    from controlllm.control.model import expand_model, number_of_layers
    from controlllm.control.schedule import mark_scheduled
    from controlllm.control.settings import ControlSettings

    attention.register()
    loaded = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, model.dtype), attn_implementation=model.attention
    )
    loaded.config.use_cache = False  # with a cache, attention leaks across the documents of a packed row
    if control is None:
        return loaded.float().train()
    try:
        settings = ControlSettings.resolve(control, num_layers=number_of_layers(loaded))
        expanded = expand_model(loaded, settings)
    except ValueError as error:
        raise UserError(str(error)) from None
    mark_scheduled(expanded, control)
    for parameter in expanded.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return expanded.train()
