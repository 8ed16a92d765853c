"""In which number formats a run computes, keeps what it trains, gathers and reduces."""

from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn

from controlllm.config import TrainConfig
from controlllm.control.expand import decoder_layers
from controlllm.errors import UserError

PURE_BF16 = ("bf16_stochastic", "bf16_kahan")
FLOAT8_SINCE = (8, 9)
"""Compute capability of the first GPUs with float8 (Ada; Hopper is 9.0)."""


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Around a forward pass: computes in what `train.precision` says where parameters are wider than that."""
    dtype = _compute_dtype(config)
    if dtype is None or config.precision in PURE_BF16:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def autocast_inside(model: Any, config: TrainConfig, device: torch.device) -> None:
    """Let the model's own call enter `autocast`, which DeepSpeed's engine turns off around it."""
    plain = model.forward

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with autocast(config, device):
            return plain(*args, **kwargs)

    model.forward = forward


def trained_dtype(config: TrainConfig) -> torch.dtype:
    """Of the parameters that are trained."""
    return torch.bfloat16 if config.precision in PURE_BF16 else torch.float32


def cast_model(model: nn.Module, config: TrainConfig) -> None:
    """Give parameters their dtype, in place: the trained ones `trained_dtype`; in pure bf16 the frozen ones it, too.

    Buffers (rotary frequencies) and quantized weights stay as they are. Before the model is sharded.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            dtype = trained_dtype(config)
            parameter.data = parameter.data.to(dtype, memory_format=torch.contiguous_format)
        elif config.precision in PURE_BF16 and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


def shard_dtypes(config: TrainConfig) -> tuple[torch.dtype | None, torch.dtype | None]:
    """`param_dtype` and `reduce_dtype` of FSDP2's MixedPrecisionPolicy: gathered small, summed in float32."""
    dtype = _compute_dtype(config)
    return dtype, None if dtype is None else torch.float32


def to_float8(model: nn.Module, config: TrainConfig, device: torch.device, *, emulate: bool = False) -> None:
    """Let the blocks' linear layers multiply in float8, in place, if `train.precision` is float8.

    Before compilation and sharding; parameters and their names stay. Each tensor is scaled by its largest magnitude
    (torchao). Sizes that are no multiples of 16, adapters and the head stay as they are. Without train.compile it is
    slow: the scaling is not fused, and torchao computes gradients of frozen weights that a compiler leaves out.
    emulate: in float32, for machines without float8. UserError when the device or the model has nothing for it.
    """
    if config.precision != "float8":
        return
    if not emulate:
        _need_float8(device)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore[import-not-found]
    except ImportError:
        raise UserError("train.precision float8: torchao is not installed; pip install 'controlllm[quant]'") from None
    layers = decoder_layers(model.base_model)  # type: ignore[arg-type]
    chosen = {id(module) for name, module in layers.named_modules() if _fits_float8(name, module)}
    if not chosen:
        raise UserError(
            "train.precision float8: no linear layer of the blocks has sizes that are multiples of 16; use bf16"
        )
    convert_to_float8_training(
        model,
        module_filter_fn=lambda module, _name: id(module) in chosen,
        config=Float8LinearConfig(emulate=emulate, pad_inner_dim=True),  # rows of any number of tokens
    )


def _compute_dtype(config: TrainConfig) -> torch.dtype | None:
    """None for float32; float8 is bf16 everywhere but inside its products."""
    return {"float32": None, "fp16": torch.float16}.get(config.precision, torch.bfloat16)


def _fits_float8(name: str, module: nn.Module) -> bool:
    plain = type(module) is nn.Linear and "lora_" not in name
    return plain and module.in_features % 16 == 0 and module.out_features % 16 == 0  # type: ignore[operator]


def _need_float8(device: torch.device) -> None:
    """UserError that names the device, if it has no float8."""
    found = f"a {device.type.upper()}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= FLOAT8_SINCE:
            return
        found = f"{torch.cuda.get_device_name(device)} ({capability[0]}.{capability[1]})"
    raise UserError(
        "train.precision float8 needs a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell), found "
        f"{found}; use bf16"
    )
