"""Expanded models as Hugging Face classes, made at run time from the base model's own classes.

A checkpoint's `config.json` has `model_type: controlllm`, the base's type in `base_model_type`, the settings in
`control`, and otherwise the base's fields. After `import controlllm`, `AutoModelForCausalLM` loads it. With layout
stack the model is an ordinary one with more layers, and is saved as such.
"""

from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import output_capturing

from controlllm.control.checkpoint_config import MODEL_TYPE
from controlllm.control.expand import expanded_config, freeze, pair, stack
from controlllm.control.loss import forward_with_loss
from controlllm.control.settings import ControlSettings
from controlllm.control.spelling import renamings


@dataclass(frozen=True)
class Family:
    """The classes of an expanded architecture."""

    config: type[PreTrainedConfig]
    decoder: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]


@cache
def family(base_model_type: str) -> Family:
    """Config, decoder and causal LM classes over those of `base_model_type` ("llama", "qwen2", ...)."""
    base_config = transformers.CONFIG_MAPPING[base_model_type]
    base_lm: Any = AutoModelForCausalLM._model_mapping[base_config]
    base_decoder: Any = AutoModel._model_mapping[base_config]
    config = _config_class(base_config, base_model_type, base_lm.__name__)
    decoder = _decoder_class(base_decoder, config)
    made = Family(config, decoder, _causal_lm_class(base_lm, config, decoder))
    AutoModel.register(config, made.decoder)
    AutoModelForCausalLM.register(config, made.causal_lm)
    return made


def control_config(base: PreTrainedConfig, settings: ControlSettings) -> PreTrainedConfig:
    """The config of the expanded model over `base`."""
    classes = family(base.model_type)
    values = expanded_config(base, settings) | {
        "base_model_type": base.model_type,
        "architectures": [classes.causal_lm.__name__],
        "model_type": MODEL_TYPE,
    }
    return classes.config.from_dict(values)


def expand_model(base: Any, settings: ControlSettings, *, shared_weights: bool = False) -> Any:
    """An expanded model with the weights of `base` (its frozen tensors are the same memory), ready to train.

    shared_weights: twins have no weights of their own, but their frozen block's; something else is trained in them.
    ValueError, before anything is changed, where the model's blocks cannot be found or have twins already.
    """
    if base.config.model_type == MODEL_TYPE:
        raise ValueError(f"{type(base).__name__} has twins already; fold it first")
    number_of_layers(base)
    config = control_config(base.config, settings)
    kernels = {name: value for name, value in vars(base.config).items() if name.endswith("_implementation_internal")}
    vars(config).update(kernels)  # of attention, of experts
    stack(base.base_model, settings)
    as_expanded(base, config)
    pair(base.base_model, settings, shared_weights=shared_weights)
    freeze(base)
    return base


def number_of_layers(base: Any) -> int:
    """Of the decoder; ValueError for a model that is more than a decoder."""
    layers = getattr(base.config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ValueError(
            f"{type(base).__name__}: looked for num_hidden_layers in its config, found {layers}; a model that also "
            "sees or hears is not expanded, save its language model by itself and give that"
        )
    return layers


def as_expanded(model: Any, config: PreTrainedConfig) -> None:
    """Give a plain model the classes that `config` belongs to."""
    classes = family(config.base_model_type)
    decoder, plain = model.base_model, model.config
    model.__class__, decoder.__class__ = classes.causal_lm, classes.decoder
    for module in model.modules():
        if getattr(module, "config", None) is plain:
            module.config = config
    _forget_captured_outputs(decoder)


def _forget_captured_outputs(decoder: nn.Module) -> None:
    """A base model that gave hidden states before has hooks on blocks that are now parts of pairs."""
    decoder.__dict__.pop("_output_capturing_hooks_installed", None)
    for module in decoder.modules():
        for key, hook in list(module._forward_hooks.items()):
            if "output_capturing_hook" in getattr(hook, "__name__", ""):
                del module._forward_hooks[key]


def _config_class(base: type[PreTrainedConfig], base_model_type: str, base_lm: str) -> type[PreTrainedConfig]:
    def to_dict(self: Any) -> dict[str, Any]:
        values = base.to_dict(self)
        control = self.control or {}
        if control.get("layout") == "stack" and control.get("alpha_scale", 1) == 1:
            values |= {"model_type": base_model_type, "architectures": [base_lm]}
        return values

    name = base.__name__.replace("Config", "")
    return type(f"Control{name}Config", (base,), {
        "model_type": MODEL_TYPE, "base_model_type": base_model_type, "control": None, "__module__": __name__,
        "to_dict": to_dict,
        "__reduce__": lambda self: (_blank_config, (base_model_type,), vars(self)),  # another process has no such name
    })  # fmt: skip


def _blank_config(base_model_type: str) -> PreTrainedConfig:
    config = family(base_model_type).config
    return config.__new__(config)


class _DecoderLayer(type):
    def __instancecheck__(cls, module: Any) -> bool:
        return getattr(module, "is_decoder_layer", False)


class DecoderLayer(metaclass=_DecoderLayer):
    """What `output_hidden_states` records: the blocks in the decoder's list, and not the two inside a pair."""


def _decoder_class(base: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    def __init__(self, config: PreTrainedConfig) -> None:  # type: ignore[no-untyped-def] - vLLM reads the annotations
        base.__init__(self, config)
        pair(self, ControlSettings.from_dict(config.control))

    recorded: dict[str, Any] = dict(base._can_record_outputs or {})
    if "hidden_states" in recorded:
        recorded["hidden_states"] = DecoderLayer
    made = type(f"Control{base.__name__}", (base,), {
        "__init__": __init__, "config_class": config, "__module__": __name__, "_can_record_outputs": recorded,
        "_load_pretrained_model": _loader(base),
    })  # fmt: skip
    output_capturing._CAN_RECORD_REGISTRY[str(made)] = (
        recorded  # otherwise done by __init__, which expansion goes round
    )
    return made


def _loader(base: type[PreTrainedModel]) -> Any:
    """Of `from_pretrained`: finds frozen tensors by the base's names, too; saved they have ours."""

    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        ours = renamings(model)
        both = replace(load_config, weight_mapping=[*ours, *(load_config.weight_mapping or [])])
        found = base._load_pretrained_model(model, state_dict, checkpoint_files, both, *args, **kwargs)
        model._weight_conversions = [one for one in model._weight_conversions if one not in ours]
        return found

    return staticmethod(load)


def _causal_lm_class(
    base: type[PreTrainedModel], config: type[PreTrainedConfig], decoder: type[PreTrainedModel]
) -> type[PreTrainedModel]:
    def __init__(self: Any, config: Any) -> None:
        base.__init__(self, config)
        self.base_model.__class__ = decoder
        pair(self.base_model, ControlSettings.from_dict(config.control))

    @wraps(base.forward)
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return base.forward(self, *args, **kwargs)
        return forward_with_loss(self, *args, labels=labels, all_logits=True, **kwargs)

    return type(f"Control{base.__name__}", (base,), {
        "__init__": __init__, "forward": forward, "plain_forward": base.forward, "config_class": config,
        "__module__": __name__, "_load_pretrained_model": _loader(base),
    })  # fmt: skip
