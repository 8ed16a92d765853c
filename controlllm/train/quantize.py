"""Frozen matrices of the blocks in 4 or 8 bits: QLoRA (Dettmers et al. 2023), and the same under twins.

The quantised base is the base: twins, stacked copies and DoRA's lengths start from the dequantised weights, not from
the precise ones, so that before the first step the model computes what its frozen weights alone compute.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from controlllm.config import QuantizationConfig
from controlllm.control.expand import decoder_layers
from controlllm.errors import UserError
from controlllm.quantized_memory import NF4_BLOCK, SCALES_BLOCK
from controlllm.train.trained import numel

Parts = dict[str, Tensor]
"""A quantised matrix as bytes (uint8), so that nothing that converts a model's numbers touches it."""


class FrozenLinear(nn.Module):
    """`nn.Linear` with a weight of few bits, multiplied as it is dequantised, forwards and backwards.

    Neither library's own product is used: bitsandbytes' 8-bit one rounds the activations, too, on GPUs and in
    validation, so that no plain checkpoint computes the same; torchao's keeps every dequantised weight for the backward
    pass, which takes back what was saved.
    """

    def __init__(self, linear: nn.Linear, quantization: QuantizationConfig):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quantization = quantization
        self.bias = linear.bias

    def take(self, weight: Tensor, device: torch.device | str, *, shared_with: Sequence["FrozenLinear"] = ()) -> Tensor:
        """Quantise (out_features, in_features), keep that on `device`, and give what it stands for, in float32.

        shared_with: layers that compute with the same matrix.
        """
        parts = quantise(weight, self.quantization)
        for name, part in parts.items():
            kept = nn.Parameter(part.to(device), requires_grad=False)
            for layer in (self, *shared_with):
                layer.register_parameter(name, kept)
        return dequantise(parts, self.quantization, shape=tuple(weight.shape), dtype=torch.float32)

    @property
    def parts(self) -> Parts:
        return {name: part for name, part in self.named_parameters(recurse=False) if name != "bias"}

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features) in float32: a new tensor each time."""
        return self.dequantised(torch.float32)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        shape = (self.out_features, self.in_features)
        return dequantise(self.parts, self.quantization, shape=shape, dtype=dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """In autocast's dtype, as a plain layer."""
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(inputs.to(dtype), bias, self)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.quantization.kind}"


class _Product(torch.autograd.Function):
    """inputs · Wᵀ + bias, of which nothing is kept: the gradient of the inputs needs only W, dequantised again."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(inputs, layer.dequantised(inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantised(gradient.dtype), None, None


def quantise(weight: Tensor, quantization: QuantizationConfig) -> Parts:
    """A matrix in the kind's bits.

    On the CPU, where it must lie: kernels of a GPU need not round the same, and consolidation quantises again.
    """
    assert weight.device.type == "cpu"
    weight, kind = weight.float().contiguous(), quantization.kind
    if kind == "nf4":
        from bitsandbytes.functional import quantize_4bit

        double, blocks = quantization.double_quant, _in_blocks(weight)
        codes, state = quantize_4bit(blocks, blocksize=NF4_BLOCK, compress_statistics=double, quant_type="nf4")
        parts = {"codes": codes, "scales": state.absmax}
        if double:
            outer: Any = state.state2
            offset: Any = state.offset
            assert outer.blocksize == SCALES_BLOCK
            parts |= {"outer_scales": outer.absmax, "scale_map": outer.code, "scale_offset": offset.reshape(1)}
    elif kind == "int8":
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, largest, _ = int8_vectorwise_quant(weight.half())
        parts = {"codes": codes, "scales": largest[:, None] / 127}
    else:
        parts = _by_torchao(weight, kind)
    return {name: part.contiguous().view(torch.uint8) for name, part in parts.items()}


def _by_torchao(weight: Tensor, kind: str) -> Parts:
    """One scale for each row."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    config = {"int8_torchao": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[kind]
    quantize_(layer, config(set_inductor_config=False))
    stored: Any = layer.weight
    return {"codes": stored.qdata, "scales": stored.scale.float()}


def dequantise(parts: Parts, quantization: QuantizationConfig, *, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The matrix that `quantise` made parts of: computed in float32, rounded once."""
    scales = parts["scales"]
    if quantization.kind != "nf4":
        code = torch.float8_e4m3fn if quantization.kind == "float8" else torch.int8
        return parts["codes"].view(code).float().mul_(scales.view(torch.float32)).to(dtype)
    operations = _bitsandbytes()
    if quantization.double_quant:
        outer, code, offset = (
            parts[name].view(torch.float32) for name in ("outer_scales", "scale_map", "scale_offset")
        )
        scales = operations.dequantize_blockwise.default(scales, outer, code, SCALES_BLOCK, torch.float32) + offset
    else:
        scales = scales.view(torch.float32)
    flat = operations.dequantize_4bit.default(parts["codes"], scales, NF4_BLOCK, "nf4", (len(scales), NF4_BLOCK), dtype)
    return flat.flatten()[: prod(shape)].view(shape)


def _in_blocks(weight: Tensor) -> Tensor:
    """(blocks, NF4_BLOCK), filled up with zeros: bitsandbytes dequantises a last block wrongly that is not full."""
    flat = weight.flatten()
    return functional.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)


def _bitsandbytes() -> Any:
    import bitsandbytes  # noqa: F401 - registers its operations

    return torch.ops.bitsandbytes


def frozen_linears(model: Any) -> dict[str, nn.Linear]:
    """What is quantised of a model that a method was applied to: the blocks' linear maps with a frozen weight, by name.

    UserError where most of what the blocks keep frozen is in other layers, which would silently stay as large.
    """
    inside = {id(module) for block in decoder_layers(model.base_model) for module in block.modules()}
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in inside and type(module) is nn.Linear and not module.weight.requires_grad
    }
    blocks = decoder_layers(model.base_model).parameters()
    matrices = sum(p.numel() for p in blocks if p.ndim > 1 and not p.requires_grad)
    linear = sum({id(layer.weight): layer.weight.numel() for layer in found.values()}.values())
    if 2 * linear < matrices:
        raise UserError(
            f"quantization stores linear layers in fewer bits, but only {linear / matrices:.0%} of the frozen weights "
            f"in the blocks of {type(model).__name__} are that: leave the section out"
        )
    return found


def make_room(
    model: nn.Module, sources: Mapping[str, str], quantization: QuantizationConfig
) -> dict[str, list[FrozenLinear]]:
    """Put layers without a weight in the place of the named ones; `FrozenLinear.take` gives them theirs.

    sources: by the layer's name, the name of its weight in the base, which those are listed by that share it. UserError
    for a model that was cut into shards with its frozen weights.
    """
    found: dict[str, list[FrozenLinear]] = {}
    for name, source in sources.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if isinstance(linear.weight, DTensor):
            raise UserError(
                "train.parallel.frozen shard would cut the blocks of weights that quantization stores together: set "
                "train.parallel.frozen to replicate"
            )
        layer = FrozenLinear(linear, quantization)
        model.set_submodule(name, layer)
        found.setdefault(source, []).append(layer)
    return found


def dequantise_(model: nn.Module) -> None:
    """Plain layers with the dequantised values, in float32, in the place of quantised ones; shared ones stay shared."""
    shared: dict[int, nn.Parameter] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, FrozenLinear):
            continue
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        key = id(layer.parts["codes"])
        plain.weight = shared.setdefault(key, nn.Parameter(layer.weight, requires_grad=False))
        plain.bias = layer.bias
        plain.train(layer.training)
        model.set_submodule(name, plain)


def weight_count(module: nn.Module) -> int:
    """Numbers in all parameters, of quantised matrices those that they stand for."""
    quantised = [layer for layer in module.modules() if isinstance(layer, FrozenLinear)]
    parts = {id(part) for layer in quantised for part in layer.parts.values()}
    sizes = {id(layer.parts["codes"]): layer.in_features * layer.out_features for layer in quantised}
    return sum(numel(p) for p in module.parameters() if id(p) not in parts) + sum(sizes.values())
