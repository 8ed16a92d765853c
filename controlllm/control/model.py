"""Expanded models as Hugging Face classes, made at run time from the base model's own classes.

A checkpoint's `config.json` has `model_type: controlllm`, the base's type in `base_model_type`, the settings in
`control`, and otherwise the base's fields. After `import controlllm`, `AutoModelForCausalLM` loads it.
"""

from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import transformers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from controlllm.control.checkpoint_config import MODEL_TYPE
from controlllm.control.expand import control_blocks, expand, freeze
from controlllm.control.loss import forward_with_loss
from controlllm.control.settings import ControlSettings


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
    config = _config_class(base_config, base_model_type)
    made = Family(config, _decoder_class(base_decoder, config), _causal_lm_class(base_lm, config))
    AutoModel.register(config, made.decoder)
    AutoModelForCausalLM.register(config, made.causal_lm)
    return made


def control_config(base: PreTrainedConfig, settings: ControlSettings) -> PreTrainedConfig:
    """The config of the expanded model over `base`."""
    classes = family(base.model_type)
    values = base.to_dict() | {
        "control": settings.to_dict(),
        "base_model_type": base.model_type,
        "architectures": [classes.causal_lm.__name__],
        "model_type": MODEL_TYPE,
    }
    return classes.config.from_dict(values)


def expand_model(base: Any, settings: ControlSettings) -> Any:
    """An expanded model with the weights of `base` (its frozen tensors are the same memory), ready to train."""
    config = control_config(base.config, settings)
    config._attn_implementation = base.config._attn_implementation
    base.__class__ = family(base.config.model_type).causal_lm
    base.config = base.base_model.config = config
    base.base_model.__class__ = family(config.base_model_type).decoder
    expand(base.base_model, settings)
    freeze(base)
    return base


def is_expanded(model: PreTrainedModel) -> bool:
    return bool(control_blocks(model))


def _config_class(base: type[PreTrainedConfig], base_model_type: str) -> type[PreTrainedConfig]:
    name = base.__name__.replace("Config", "")
    return type(f"Control{name}Config", (base,), {
        "model_type": MODEL_TYPE, "base_model_type": base_model_type, "control": None, "__module__": __name__,
        "__reduce__": lambda self: (_blank_config, (base_model_type,), vars(self)),  # another process has no such name
    })  # fmt: skip


def _blank_config(base_model_type: str) -> PreTrainedConfig:
    config = family(base_model_type).config
    return config.__new__(config)


def _decoder_class(base: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    def __init__(self, config: PreTrainedConfig) -> None:
        base.__init__(self, config)
        expand(self, ControlSettings.from_dict(config.control))

    return type(
        f"Control{base.__name__}", (base,), {"__init__": __init__, "config_class": config, "__module__": __name__}
    )


def _causal_lm_class(base: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    def __init__(self: Any, config: Any) -> None:
        base.__init__(self, config)
        expand(self.base_model, ControlSettings.from_dict(config.control))

    @wraps(base.forward)
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return base.forward(self, *args, **kwargs)
        return forward_with_loss(self, *args, labels=labels, **kwargs)

    return type(f"Control{base.__name__}", (base,), {
        "__init__": __init__, "forward": forward, "config_class": config, "__module__": __name__,
    })  # fmt: skip
