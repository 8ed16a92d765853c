"""Twins without weights of their own (`control.twin: lora | ia3`): the frozen block's, and adapters inside.

Trained, saved and sent between processes are the adapters and what blends the pair. Consolidated, such a twin becomes a
full one, so that all that works with expanded models works with it.
"""

from typing import Any

from torch import nn

from controlllm.config import ControlConfig
from controlllm.control.block import ControlBlock
from controlllm.control.expand import control_blocks
from controlllm.control.model import expand_model, number_of_layers
from controlllm.control.schedule import mark_scheduled
from controlllm.control.settings import ControlSettings
from controlllm.train.adapters import Adapter, add_adapters


def expand(model: Any, control: ControlConfig, adapter: Adapter | None, *, seed: int) -> None:
    """Give a plain model the twins of `control`, in place: with weights of their own, or with adapters only.

    The model starts as the base in both cases. ValueError where they do not fit the model.
    """
    settings = ControlSettings.resolve(control, num_layers=number_of_layers(model))
    expand_model(model, settings, shared_weights=control.twin != "full")
    if control.twin != "full":
        assert adapter is not None, "the config asks for the section"
        kept = [parameter for parameter in model.parameters() if parameter.requires_grad]  # alphas, relaxations
        add_adapters(model, adapter, seed=seed, blocks=[block.expanded for block in control_blocks(model)])
        for parameter in kept:
            parameter.requires_grad_(True)
    mark_scheduled(model, control)


def shares_weights(pair: nn.Module) -> bool:
    """Whether a decoder layer is a pair whose twin computes with the frozen block's own weights."""
    if not isinstance(pair, ControlBlock):
        return False
    frozen = {id(parameter) for parameter in pair.frozen.parameters()}
    return any(id(parameter) in frozen for parameter in pair.expanded.parameters())


def own_weights(model: nn.Module) -> None:
    """Give every twin that shares its block's weights copies of them, in place; nothing that it computes changes."""
    for block in control_blocks(model):
        frozen = {id(parameter) for parameter in block.frozen.parameters()}
        for module in block.expanded.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in frozen:
                    setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
