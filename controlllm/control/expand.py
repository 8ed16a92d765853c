"""Turning a decoder into an expanded one, and saying which of its tensors are trained."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from controlllm.control.block import ControlBlock, attention_of, set_layer_index, twin_of
from controlllm.control.settings import ControlSettings

# The last linear maps of attention and MLP in the families of transformers: zeroed, a pre-norm block is the identity.
OUTPUT_NAMES = ("o_proj", "down_proj", "out_proj", "dense", "c_proj", "fc2", "wo", "w2", "dense_4h_to_h")


def expanded_config(base: PreTrainedConfig, settings: ControlSettings) -> dict[str, Any]:
    """The base config's fields with the stacked layers counted, also in lists that have one entry per layer."""
    values, layers = base.to_dict(), base.num_hidden_layers
    if not settings.sites or settings.sites[-1] >= layers or settings.sites != sorted(set(settings.sites)):
        raise ValueError(f"sites {settings.sites} must be ascending layers of 0..{layers - 1}")
    if settings.layout == "hybrid" and len(settings.sites) % 2:
        raise ValueError(
            f"layout hybrid alternates stack and concat: found {len(settings.sites)} sites, not an even number"
        )
    for name, value in values.items():
        if "layer" in name and isinstance(value, list) and len(value) == layers:
            values[name] = [entry for i, entry in enumerate(value) for _ in range(1 + (i in settings.stacked_sites))]
    return values | {"num_hidden_layers": layers + len(settings.stacked_sites), "control": settings.to_dict()}


def stack(decoder: nn.Module, settings: ControlSettings) -> None:
    """Insert the copies after their sites, in place; each starts as the identity."""
    layers = decoder_layers(decoder)
    for index in settings.stacked:
        layers.insert(index, identity_copy(layers[index - 1]))
    for index, layer in enumerate(layers):
        set_layer_index(layer, index)


def pair(decoder: nn.Module, settings: ControlSettings, *, shared_weights: bool = False) -> None:
    """Replace the decoder layers at the sites by ControlBlocks, in place; a twin may share its block's weights."""
    layers = decoder_layers(decoder)
    hidden_size = decoder.config.hidden_size  # type: ignore[union-attr]
    for number, index in enumerate(settings.paired):
        slot = len(layers) + number
        layers[index] = ControlBlock(
            layers[index],
            settings,
            hidden_size=hidden_size,  # type: ignore[arg-type]
            cache_slot=slot,
            shared_weights=shared_weights,
        )
    if settings.alpha_scale != 1:
        for index in settings.stacked:
            dim(layers[index], settings.alpha_scale)
    for layer in layers:
        layer.is_decoder_layer = True  # type: ignore[assignment] - for `output_hidden_states`


def dim(layer: Any, alpha_scale: float) -> None:
    """Let only a share of what a stacked layer adds through; at 0 exactly its input."""
    if not hasattr(layer, "alpha_scale"):
        layer.register_forward_hook(_dimmed)
    layer.alpha_scale = alpha_scale


def _dimmed(layer: Any, inputs: Any, output: Any) -> Any:
    return output if layer.alpha_scale == 1 else torch.lerp(inputs[0], output, layer.alpha_scale)


def set_alpha_scale(model: Any, alpha_scale: float) -> None:
    """Turn the dial of a loaded expanded model, in place; keys and values cached before are another model's.

    ValueError for a model without twins or copies, and for a scale that is not within 0..1.
    """
    settings = settings_of(model)
    if settings is None:
        raise ValueError(f"{type(model).__name__} has no dial: it has neither twins nor stacked copies")
    replace(settings, alpha_scale=alpha_scale)  # refuses a scale that is out of range
    for block in control_blocks(model):
        block.turn_to(alpha_scale)
    layers = decoder_layers(model.base_model)
    for index in settings.stacked:
        dim(layers[index], alpha_scale)


def identity_copy(layer: nn.Module) -> nn.Module:
    """A copy whose attention and MLP give zero, so that only the residual stream is left."""
    twin = twin_of(layer)
    zeroed = [_zero(module) for name, module in twin.named_modules() if name.rpartition(".")[2] in OUTPUT_NAMES]
    zeroed += [
        _zero_parameter(parameter)
        for name, parameter in twin.named_parameters()
        if name.rpartition(".")[2] in OUTPUT_NAMES  # experts that are one tensor
    ]
    if len(zeroed) < 2:
        raise ValueError(
            f"{type(layer).__name__}: looked for the output projections of attention and MLP by the names "
            f"{', '.join(OUTPUT_NAMES)}, found {len(zeroed)}; a stacked copy cannot start as the identity"
        )
    return twin


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        _zero_parameter(parameter)


def _zero_parameter(parameter: nn.Parameter) -> None:
    parameter.data.zero_()


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The list of blocks of a Hugging Face decoder; ValueError says what was looked for."""
    wanted = decoder.config.num_hidden_layers  # type: ignore[union-attr]
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    found = [module for module in lists.values() if len(module) == wanted and all(map(_is_block, module))]
    if len(found) == 1:
        return found[0]
    seen = ", ".join(
        f"{name} with {len(module)} × {type(module[0]).__name__}" for name, module in lists.items() if len(module)
    )
    raise ValueError(
        f"{type(decoder).__name__}: looked for one ModuleList of {wanted} blocks, each with one attention that has a "
        f"layer_idx, found {len(found)} (ModuleLists: {seen or 'none'})"
    )


def _is_block(module: nn.Module) -> bool:
    if isinstance(getattr(module, "_fsdp_wrapped_module", module), ControlBlock):  # torch's older FSDP around it
        return True
    try:
        return attention_of(module) is not module
    except ValueError:
        return False


def control_blocks(model: nn.Module) -> list[ControlBlock]:
    """The pairs of a model, bottom to top."""
    return [module for module in model.modules() if isinstance(module, ControlBlock)]


def settings_of(model: Any) -> ControlSettings | None:
    """The settings in a model's config, or None for a model that is not expanded."""
    values = getattr(model.config, "control", None)
    return ControlSettings.from_dict(values) if values else None


def freeze(model: PreTrainedModel) -> None:
    """Leave only what Control LLM trains: twins, stacked copies and interpolations.

    A call of its own, because `from_pretrained` resets `requires_grad`.
    """
    model.requires_grad_(False)
    settings = settings_of(model)
    for index in settings.stacked if settings else []:
        decoder_layers(model.base_model)[index].requires_grad_(True)
    for block in control_blocks(model):
        block.expanded.requires_grad_(True)
        block.interpolation.requires_grad_(True)
        block.frozen.requires_grad_(False)  # a twin may share its weights
        for parameter in _kept_still(block):
            parameter.requires_grad_(False)


def _kept_still(block: ControlBlock) -> list[nn.Parameter]:
    """Parameters of a pair that are not trained: what no loss depends on, and the weights if `train_alpha` is false."""
    # The divergence of attention maps looks at no hidden state.
    interpolation, measured = block.interpolation, block.divergence_name not in ("none", "attention")
    names = set(interpolation.without_gradient(measured=measured, gated=block.weigh_by_gate))
    if block.train_alpha:
        return [interpolation.get_parameter(name) for name in names]
    relaxations = [p for name, p in block.expanded.named_parameters() if name.endswith("relaxation_logit")]
    return [interpolation.get_parameter(name) for name in names | set(interpolation.alpha_parameters)] + relaxations
