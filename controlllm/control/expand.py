"""Turning a decoder into an expanded one, and saying which of its tensors are trained."""

from torch import nn
from transformers import PreTrainedModel

from controlllm.control.block import ControlBlock
from controlllm.control.settings import ControlSettings


def expand(decoder: PreTrainedModel, settings: ControlSettings) -> None:
    """Replace the decoder layers at the sites by ControlBlocks, in place."""
    layers = decoder_layers(decoder)
    for number, site in enumerate(settings.sites):
        layers[site] = ControlBlock(
            layers[site], settings, hidden_size=decoder.config.hidden_size, cache_slot=len(layers) + number
        )


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The list of blocks of a Hugging Face decoder; ValueError says what was looked for."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(decoder).__name__} has no ModuleList called 'layers'; its blocks cannot be found")
    return layers


def control_blocks(model: nn.Module) -> list[ControlBlock]:
    """The pairs of a model, bottom to top."""
    return [module for module in model.modules() if isinstance(module, ControlBlock)]


def freeze(model: nn.Module) -> None:
    """Leave only the twins and the interpolations trainable. A call of its own: `from_pretrained` resets it."""
    model.requires_grad_(False)
    for block in control_blocks(model):
        block.expanded.requires_grad_(True)
        for parameter in block.interpolation.parameters():
            parameter.requires_grad_(block.train_alpha)
