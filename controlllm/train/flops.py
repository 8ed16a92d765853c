"""The floating-point operations that a training step needs, and those that the device could do meanwhile (MFU).

Useful are those of control/cost.py: what the expanded model computes for real tokens, each document's attention alone
and causal. Recomputation by activation checkpointing, padding inside kernels and elementwise work are not.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from controlllm.config import MetricsConfig
from controlllm.control.block import ControlBlock, attention_of
from controlllm.control.cost import (
    ModelFlops,
    StepFlops,
    control_step,
    full_step,
    lora_step,
    mean_length,
    partial_step,
    shared_twin_step,
)
from controlllm.control.expand import control_blocks, decoder_layers, settings_of
from controlllm.control.settings import ControlSettings
from controlllm.train.prompt import virtual_tokens_of

# Dense TFLOP/s in bfloat16 with float32 accumulation, from the makers' data sheets (which often print the double, with
# sparsity), and whether float8 doubles it. The first pattern that is found in the device's name counts.
PEAKS = (
    (r"GB200|GB300", 2500.0, True),
    (r"B200|B300", 2250.0, True),
    (r"H20\b", 148.0, True),
    (r"(H100|H200|H800).*NVL", 835.5, True),
    (r"(H100|H800).*PCIe", 756.0, True),
    (r"H100|H200|GH200|H800", 989.4, True),
    (r"A100|A800", 312.0, False),
    (r"A30\b", 165.0, False),
    (r"A40\b", 149.7, False),
    (r"A10\b", 125.0, False),
    (r"RTX A6000", 154.8, False),
    (r"L40S", 362.0, True),
    (r"L40\b", 181.0, True),
    (r"L4\b", 121.0, True),
    (r"RTX 6000 Ada", 364.2, True),
    (r"RTX 5090", 209.5, True),
    (r"RTX 4090", 165.2, True),
    (r"RTX 3090", 71.0, False),
    (r"MI300X|MI325X", 1307.4, True),
    (r"MI355X", 2516.6, True),
    (r"MI350X", 2306.9, True),
)

FULL, SLIDING = "full_attention", "sliding_attention"


def peak_flops(device: torch.device, precision: str, config: MetricsConfig) -> float | None:
    """FLOP/s of one device at most: `metrics.peak_tflops`, or by its name; None where neither says (CPU, float32)."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    return known_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def known_peak(name: str, precision: str) -> float | None:
    """FLOP/s by the device's name; None for an unknown one, and for a precision it has no tensor cores for."""
    if precision == "float32":
        return None
    for pattern, tflops, has_float8 in PEAKS:
        if re.search(pattern, name):
            if precision == "float8":
                return 2e12 * tflops if has_float8 else None
            return 1e12 * tflops
    return None


@dataclass(frozen=True)
class StepCost:
    """What one step of a model costs, by the documents in it. The FLOPs of several processes' documents add up."""

    config: Any
    settings: ControlSettings | None
    """Of an expanded model."""
    matmul: float
    """Products of one layer, multiplications per token."""
    adapters: float
    """Of all low-rank ones together; DoRA's lengths are computed once for all tokens."""
    before_adapters: tuple[float, float] | None
    """Products and attentions of the backward pass before the first adapter, of twins in the lowest; None without."""
    trained: tuple[int, ...]
    """Layers whose own weights are trained; with the head, all of the model is."""
    head_trained: bool
    virtual_tokens: int = 0
    """Before every document; nothing else is trained then."""

    def step(self, lengths: Sequence[int], *, targets: int, causal: bool = True) -> float:
        """FLOPs of forward and backward pass over documents of these lengths, of which `targets` tokens are learned.

        causal: whether attention is counted without what the mask hides.
        """
        lengths = [length + self.virtual_tokens for length in lengths]
        return self._step(self._base(lengths, targets, causal), sum(lengths)).total

    def _step(self, base: ModelFlops, tokens: int) -> StepFlops:
        if self.before_adapters:
            adapters, (products, attentions) = 2.0 * tokens * self.adapters, self.before_adapters
            unused = 2.0 * tokens * products + 2 * attentions * base.attention
            if self.settings:
                return shared_twin_step(base, self.settings, adapters=adapters, unused=unused)
            return lora_step(base, adapters=adapters, unused=unused)
        if self.settings:
            return control_step(base, self.settings)
        if self.virtual_tokens:
            return lora_step(base, adapters=0.0)
        return full_step(base) if self.head_trained else partial_step(base, self.trained)

    def _base(self, lengths: Sequence[int], targets: int, causal: bool) -> ModelFlops:
        config, tokens = self.config, sum(lengths)
        width = config.num_attention_heads * _head_dim(config)
        windows = _windows(config)
        seq = sum(mean_length(lengths, window=window) for window in windows) / len(windows)
        return ModelFlops(
            layers=config.num_hidden_layers - (len(self.settings.stacked) if self.settings else 0),
            matmul=2.0 * tokens * self.matmul,
            attention=4.0 * tokens * width * seq * (0.5 if causal else 1),
            head=2.0 * targets * config.hidden_size * config.vocab_size,
        )


def step_cost(model: Any) -> StepCost | None:
    """Read off a model before it is spread over processes; None for one whose blocks the formulas do not describe.

    Those are blocks of different sizes, with attention of another kind (latent, linear), or with experts that are not
    chosen by a fixed number per token.
    """
    config = model.config
    layers = [_base_block(layer) for layer in decoder_layers(model.base_model)]
    sizes = [_products(layer, config) for layer in layers]
    if not _plain_attention(config) or None in sizes or len(set(sizes)) != 1 or not sizes[0]:
        return None
    blocks = [block.expanded for block in control_blocks(model)] or layers
    adapters = [list(_adapters(block)) for block in blocks]
    per_layer = [sum(_size(half) for _, pair in found for half in pair) for found in adapters]
    trained = tuple(i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters()))
    head, virtual = model.get_output_embeddings(), virtual_tokens_of(model)
    return StepCost(
        config=config,
        settings=settings_of(model),
        matmul=sizes[0],
        adapters=sum(per_layer),
        before_adapters=_before(blocks, adapters, sizes[0]) if any(adapters) else None,
        trained=trained,
        head_trained=any(p.requires_grad for p in head.parameters()),
        virtual_tokens=virtual.count if virtual else 0,
    )


def _base_block(layer: nn.Module) -> nn.Module:
    """The block of the base model in a decoder layer, which may be a pair and wrapped."""
    pairs = [module for module in layer.modules() if isinstance(module, ControlBlock)]
    return pairs[0].frozen if pairs else layer


def _products(block: nn.Module, config: Any) -> float | None:
    """Multiplications per token in the block's maps without adapters; None where experts per token are not fixed."""
    total = 0.0
    for name, module in block.named_modules():
        if _is_adapter(name) or hasattr(module, "base_layer"):  # a layer with an adapter holds the plain one
            continue
        if hasattr(module, "in_features"):  # also layers that keep their weights in fewer bits, in another shape
            total += _size(module)
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3:
                active = getattr(config, "num_experts_per_tok", None)
                if not active:
                    return None
                total += parameter.numel() * active / parameter.shape[0]
            elif parameter.ndim == 2 and not isinstance(module, nn.Embedding):
                total += parameter.numel()
    return total


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "ia3_l" in name


def _size(module: Any) -> float:
    return float(module.in_features * module.out_features)


def _adapters(block: nn.Module) -> Iterator[tuple[nn.Module, list[Any]]]:
    """The adapted maps of a block, each with the two maps of every adapter of it."""
    for module in block.modules():
        if hasattr(module, "lora_A"):
            halves: Any = module
            yield module, [half[key] for key in halves.lora_A for half in (halves.lora_A, halves.lora_B)]
        elif hasattr(module, "ia3_l"):
            yield module, []


def _before(layers: list[nn.Module], adapters: list[list[tuple[nn.Module, list[Any]]]], matmul: float) -> Any:
    """Products per token and attentions of which no gradient goes on: those below the lowest adapter.

    Nor does one through maps that share their input with the lowest adapted one, or through the first half of theirs.
    """
    lowest = next(index for index, found in enumerate(adapters) if found)
    products, attentions = lowest * matmul, float(lowest)
    first_halves = {id(module): sum(_size(half) for half in halves[::2]) for module, halves in adapters[lowest]}
    for number, stage in enumerate(_stages(layers[lowest])):
        reached = [module for module in stage if not getattr(module, "is_feedforward", False)]  # IA3 of its input
        products += sum(_size(module) + first_halves.get(id(module), 0.0) for module in reached)
        if any(id(module) in first_halves for module in stage):
            break
        attentions += number == 0
    return products, attentions


def _stages(block: nn.Module) -> Iterator[list[Any]]:
    """The linear maps of a block in the order they run, those with the same input together."""
    attention = attention_of(block)
    inside = set(attention.modules())
    maps = [
        module
        for name, module in block.named_modules()
        if hasattr(module, "in_features") and "base_layer" not in name and not _is_adapter(name)
    ]
    for part in ([m for m in maps if m in inside], [m for m in maps if m not in inside]):
        yield part[:-1]  # queries, keys and values; gate and up
        yield part[-1:]


def _plain_attention(config: Any) -> bool:
    """Whether every layer multiplies queries with keys and weights with values, of its window or of all tokens."""
    kinds = set(getattr(config, "layer_types", None) or ())
    latent = any(getattr(config, name, None) for name in ("kv_lora_rank", "qk_nope_head_dim"))
    return isinstance(config.num_attention_heads, int) and not latent and kinds <= {FULL, SLIDING}


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _windows(config: Any) -> list[int | None]:
    """How many tokens a token of each kind of layer sees at most, by layer or once for all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return [window if kind == SLIDING else None for kind in kinds] if kinds else [window]
