"""What vLLM runs at its start (entry point `vllm.general_plugins`), so that it loads expanded checkpoints.

Families in NATIVE run on vLLM's own layers: a site is a pair of them, each attention with its own layer of the KV
cache, blended by our interpolations. Every other family runs through vLLM's backend over transformers' modules.
"""

import copy
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from controlllm.control.interpolation import STRATEGIES
from controlllm.control.norm import RelaxedNorm, relax_norms
from controlllm.control.settings import ControlSettings

# Of vLLM's modules, those whose layers take (positions, hidden_states, residual) and whose decoder keeps a plain list.
NATIVE = {
    "ControlLlamaForCausalLM": "llama",
    "ControlMistralForCausalLM": "mistral",
    "ControlPhi3ForCausalLM": "phi3",
    "ControlQwen2ForCausalLM": "qwen2",
    "ControlQwen3ForCausalLM": "qwen3",
}
# vLLM imports a model's class by its name when a checkpoint asks for it, and not before.
MODEL_CLASS = "ControlForCausalLM"
Weights = Iterable[tuple[str, Tensor]]


def register() -> None:
    """Name a class for the expanded form of every causal LM of transformers. Called in each process of vLLM."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    names = {f"Control{base}" for base in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    for name in names - ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, f"{__name__}:{name if name in NATIVE else MODEL_CLASS}")


def set_alpha_scale(model: nn.Module, scale: float) -> None:
    """Turn the dial of a running model, captured graphs included: 0 is the base model, 1 the trained one.

    `llm.apply_model(partial(set_alpha_scale, scale=0.5))`, between requests. What the KV cache holds was computed at
    the former value: `llm.reset_prefix_cache()` is the caller's to do. ValueError for a model without a dial.
    """
    if not 0 <= scale <= 1:
        raise ValueError(f"alpha_scale must be between 0 (the base model) and 1, found {scale}")
    dials = [buffer for name, buffer in model.named_buffers() if name.endswith(".alpha_scale")]
    if not dials:
        raise ValueError(f"alpha_scale: {type(model).__name__} has no twins; give a checkpoint with pairs")
    for dial in dials:
        dial.fill_(scale)


def __getattr__(name: str) -> Any:
    if name == MODEL_CLASS:
        return _backend_class()
    if name in NATIVE:
        return _native_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Dialled(nn.Module):
    """A layer of which a share is let through. The share is a buffer, so that a captured graph sees it change."""

    alpha_scale: Tensor

    def __init__(self, settings: ControlSettings):
        super().__init__()
        share = torch.tensor(float(settings.alpha_scale), dtype=torch.get_default_dtype())
        self.register_buffer("alpha_scale", share, persistent=False)

    def let_through(self, without: Tensor, whole: Tensor) -> Tensor:
        return torch.lerp(without, whole, self.alpha_scale)  # exact at 0 and at 1


class _Blending(_Dialled):
    """A block and its twin, without what only training needs."""

    def __init__(self, frozen: nn.Module, expanded: nn.Module, interpolation: nn.Module, settings: ControlSettings):
        super().__init__(settings)
        self.frozen, self.expanded, self.interpolation = frozen, expanded, interpolation

    def blend(self, frozen: Tensor, expanded: Tensor, inputs: Tensor) -> Tensor:
        whole, _alpha = self.interpolation(frozen, expanded, inputs)
        return self.let_through(frozen, whole)


class _BackendPair(_Blending):
    """Over transformers' blocks: hidden states (1, tokens, hidden)."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        frozen = self.frozen(hidden_states, *args, **kwargs)
        return self.blend(frozen, self.expanded(hidden_states, *args, **kwargs), hidden_states)


# (tokens, hidden) each. A layer of vLLM adds to `residual`, in place, and leaves the last sum to the next norm.
Handed = tuple[Tensor, Tensor | None]


def _sum(hidden_states: Tensor, residual: Tensor | None) -> Tensor:
    return hidden_states if residual is None else hidden_states + residual


def _handed_on(hidden_states: Tensor, ends_stage: bool) -> Handed:
    """The final norm and the next stage want a residual; every other layer does without."""
    return hidden_states, torch.zeros_like(hidden_states) if ends_stage else None


class _NativePair(_Blending):
    """Over layers of vLLM, in the place of one."""

    def __init__(self, *parts: Any, ends_stage: bool):
        super().__init__(*parts)
        self.ends_stage = ends_stage

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **_none: Any) -> Handed:
        inputs = _sum(hidden_states, residual)
        frozen = _sum(*self.frozen(positions, inputs.clone(), None))
        expanded = _sum(*self.expanded(positions, inputs.clone(), None))
        return _handed_on(self.blend(frozen, expanded, inputs), self.ends_stage)


class _NativeCopy(_Dialled):
    """A stacked layer of vLLM that the dial turns down to the identity."""

    def __init__(self, layer: nn.Module, settings: ControlSettings, *, ends_stage: bool):
        super().__init__(settings)
        self.copy, self.ends_stage = layer, ends_stage

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **_none: Any) -> Handed:
        inputs = _sum(hidden_states, residual)
        whole = _sum(*self.copy(positions, inputs.clone(), None))
        return _handed_on(self.let_through(inputs, whole), self.ends_stage)


class _NativeRelaxedNorm(RelaxedNorm):
    """With the sum of hidden states and residual that a norm of vLLM also does."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return super().forward(hidden_states)
        total = hidden_states + residual
        return super().forward(total), total


@cache
def _native_class(name: str) -> type:
    from vllm.model_executor.models.interfaces import SupportsQuant
    from vllm.model_executor.models.utils import AutoWeightsLoader

    module = importlib.import_module(f"vllm.model_executor.models.{NATIVE[name]}")
    base: Any = getattr(module, name.removeprefix("Control"))

    class ControlNative(base, SupportsQuant):  # of all these only Qwen3's class lacks it
        def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
            if _has_native_layers(vllm_config.model_config.hf_config):
                return super().__new__(cls, vllm_config=vllm_config, prefix=prefix)
            return _backend_class()(vllm_config=vllm_config, prefix=prefix)

        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            config = vllm_config.model_config.hf_config
            settings = _settings(config)
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            _expand(self.model, settings, vllm_config, prefix=f"{prefix}.model".lstrip("."))
            self.model.do_not_compile |= _compiles_whole(vllm_config.compilation_config)
            self.expected = None if getattr(config, "quantization_config", None) else _tensor_names(config)

        def load_weights(self, weights: Weights) -> set[str]:
            settings = _settings(self.config)
            weights = _named_alike(weights, settings)
            if self.expected is not None:
                weights = _checked(weights, self.expected, tied=self.config.tie_word_embeddings)
            # As the bases do, but for Mistral's, which looks for the names of another format in ours.
            return AutoWeightsLoader(self).load_weights(_into_copies(weights, settings))

    ControlNative.__name__ = ControlNative.__qualname__ = name
    return ControlNative


def _compiles_whole(compilation: Any) -> bool:
    """As vLLM does on a CPU, where Inductor ends with a cycle for some layouts; on GPUs graphs end at attentions."""
    from vllm.config import CompilationMode

    return compilation.mode == CompilationMode.DYNAMO_TRACE_ONCE and compilation.backend == "inductor"


def _has_native_layers(config: Any) -> bool:
    """vLLM's Qwen layers know one window for all layers, and Qwen2's one size of heads."""
    if config.base_model_type not in ("qwen2", "qwen3"):
        return True
    mixed = len(set(getattr(config, "layer_types", None) or [])) > 1
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    usual = config.base_model_type == "qwen3" or head * config.num_attention_heads == config.hidden_size
    return usual and not mixed


def _settings(config: Any) -> ControlSettings:
    """ValueError says which setting cannot be run."""
    settings = ControlSettings.from_dict(config.control)
    if settings.interpolation not in STRATEGIES:
        known = ", ".join(sorted(STRATEGIES))
        raise ValueError(f"control.interpolation: {settings.interpolation!r} is not known here; one of {known} is")
    return settings


def _expand(decoder: Any, settings: ControlSettings, vllm_config: Any, *, prefix: str) -> None:
    """Replace the layers of this stage at the sites, in place."""
    hidden_size = decoder.config.hidden_size
    for index in range(decoder.start_layer, decoder.end_layer):
        layer, ends_stage = decoder.layers[index], index == decoder.end_layer - 1
        if index in settings.stacked:
            decoder.layers[index] = _NativeCopy(layer, settings, ends_stage=ends_stage)
        if index in settings.paired:
            twin = _twin_of(layer, vllm_config, f"{prefix}.layers.{index}.expanded")
            if settings.norm_relaxation != 0:
                relax_norms(twin, settings.norm_relaxation, _NativeRelaxedNorm)
            interpolation = STRATEGIES[settings.interpolation](hidden_size, alpha=settings.alpha)
            pair = _NativePair(layer, twin, interpolation, settings, ends_stage=ends_stage)
            decoder.layers[index] = pair.requires_grad_(False)


def _twin_of(layer: Any, vllm_config: Any, prefix: str) -> nn.Module:
    """A second layer of the same kind; `prefix` names its attention's layer of the KV cache."""
    if "vllm_config" in inspect.signature(type(layer)).parameters:
        from vllm.model_executor.models.llama import LlamaDecoderLayer

        # Mistral's own class differs in its attention, and wants a prefix that ends with the layer's number.
        return LlamaDecoderLayer(vllm_config, prefix=prefix, attn_layer_type=type(layer.self_attn))
    return type(layer)(
        config=vllm_config.model_config.hf_config,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        prefix=prefix,
    )


def _tensor_names(config: Any) -> set[str]:
    """Of a whole checkpoint."""
    from controlllm.control.model import family

    with torch.device("meta"):
        return set(family(config.base_model_type).causal_lm(copy.deepcopy(config)).state_dict())


def _named_alike(weights: Weights, settings: ControlSettings) -> Iterator[tuple[str, Tensor]]:
    """The frozen tensors of a pair may be stored under the base model's names."""
    for name, tensor in weights:
        layer = re.match(r"model\.layers\.(\d+)\.(?!frozen\.|expanded\.|interpolation\.)", name)
        if layer and int(layer[1]) in settings.paired:
            name = f"{layer[0]}frozen.{name[layer.end() :]}"
        yield name, tensor


def _checked(weights: Weights, expected: set[str], *, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """ValueError names the first tensor that is too many or missing: vLLM misses parts of what it fuses."""
    seen: set[str] = set()
    for name, tensor in weights:
        if name in seen or name not in expected:
            raise ValueError(f"checkpoint: tensor {name} is {'there twice' if name in seen else 'none of the model'}")
        seen.add(name)
        yield name, tensor
    if missing := sorted(expected - seen - ({"lm_head.weight"} if tied else set())):
        raise ValueError(f"checkpoint: tensor {missing[0]} is missing ({len(missing)} in all); copy it again")


def _into_copies(weights: Weights, settings: ControlSettings) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) in settings.stacked:
            name = f"{layer[0]}copy.{name[layer.end() :]}"
        yield name, tensor


@cache
def _backend_class() -> type:
    from vllm.model_executor.models.transformers import TransformersForCausalLM

    class ControlForCausalLM(TransformersForCausalLM):
        """vLLM's backend over transformers' modules, with a KV cache for the twins' attentions too."""

        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            settings = _settings(vllm_config.model_config.hf_config)
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            _with_dials(self.model.get_decoder(), settings)

        def pipeline_parallel(self) -> None:
            """Stages are cut at an attention's index, and a twin's lies above those of all decoder layers."""
            if self.pp_group.world_size > 1:
                raise ValueError(
                    f"pipeline_parallel_size is {self.pp_group.world_size}, but an expanded model cannot be cut into "
                    "stages; use tensor_parallel_size"
                )

        def _create_attention_instances(self, prefix: str = "") -> None:
            with _attentions_as_layers(self.text_config):
                super()._create_attention_instances(prefix)

        def load_weights(self, weights: Weights) -> set[str]:
            return super().load_weights(_named_alike(weights, _settings(self.config)))

    return ControlForCausalLM


def _with_dials(decoder: Any, settings: ControlSettings) -> None:
    """Pairs and stacked layers of transformers, changed in place so that their share is a buffer."""
    for index in settings.paired:
        block = decoder.layers[index]
        decoder.layers[index] = _BackendPair(block.frozen, block.expanded, block.interpolation, settings)
    for index in settings.stacked:
        layer = decoder.layers[index]
        layer._forward_hooks.clear()  # of the share as a number
        vars(layer).pop("alpha_scale", None)
        layer.register_buffer("alpha_scale", _Dialled(settings).alpha_scale, persistent=False)
        layer.register_forward_hook(_let_through)


def _let_through(layer: Any, inputs: Any, output: Any) -> Tensor:
    return torch.lerp(inputs[0], output, layer.alpha_scale)


@contextmanager
def _attentions_as_layers(config: Any) -> Iterator[None]:
    """While inside, the config counts attentions: the decoder layers', then one per pair, of that layer's kind."""
    sites = ControlSettings.from_dict(config.control).paired
    kinds = getattr(config, "layer_types", None)
    counted: dict[str, Any] = {"num_hidden_layers": config.num_hidden_layers + len(sites)}
    if kinds is not None:
        counted["layer_types"] = [*kinds, *(kinds[site] for site in sites)]
    own = {name: getattr(config, name) for name in counted}
    vars(config).update(counted)
    try:
        yield
    finally:
        vars(config).update(own)
