"""Liger's Triton kernels in the place of a family's norms, rotary embedding, MLP and of the loss."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from controlllm.control.expand import decoder_layers
from controlllm.control.head import linear_cross_entropy
from controlllm.control.norm import RelaxedNorm
from controlllm.errors import UserError
from controlllm.train.activations import inner_blocks

# Liger replaces this one in the family's module: it is a function, not part of an instance.
ROTARY = "apply_rotary_pos_emb"


def use_kernels(model: Any, choice: str, device: torch.device) -> Literal["torch", "liger"]:
    """Put Liger's kernels into `model` where they can run, in place, and say what it runs with.

    choice: torch, liger, or auto: liger where there is a GPU, the package and a family it knows. Of a pair both blocks
    get them; a relaxed norm stays, around Liger's. UserError where liger is asked for and cannot be had.
    """
    if choice == "torch":
        return "torch"
    family = getattr(model.config, "base_model_type", model.config.model_type)
    if lacking := _lacking(family, device):
        if choice == "liger":
            raise UserError(f"train.kernels liger {lacking}; set it to auto or torch")
        return "torch"
    _patch(model, _families()[family])
    model.head_loss = liger_cross_entropy
    return "liger"


def liger_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """linear_cross_entropy by Liger's kernel, which cannot be given no target at all."""
    if not len(targets):
        return linear_cross_entropy(hidden, weight, bias, targets)
    fused = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    if torch.is_autocast_enabled(hidden.device.type) and not weight.requires_grad:
        weight = weight.to(torch.get_autocast_dtype(hidden.device.type))  # once, not for every chunk
    return fused(hidden, weight, targets, bias, reduction="sum", accum_dtype=torch.float32)


def _lacking(family: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs a GPU, and this process runs on the {device.type}"
    if find_spec("liger_kernel") is None:
        return "needs the package liger-kernel, which is not installed"
    if family not in (known := _families()):
        return f"has no kernels for {family}: it knows {', '.join(sorted(known))}"
    return None


def _families() -> dict[str, Any]:
    """Model type → function that patches a model of it."""
    return importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN


def _patch(model: Any, apply: Any) -> None:
    """Let Liger patch all blocks as if they stood in one row, and leave the family's classes as they were."""
    plain = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models."))
    module = importlib.import_module(plain.__module__)
    before = dict(vars(module))
    with _flat(model):
        apply(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    for name, value in before.items():
        if name != ROTARY:
            setattr(module, name, value)


@contextmanager
def _flat(model: Any) -> Iterator[None]:
    """While inside, the decoder's list holds the blocks of pairs, too, and the norms inside relaxed ones."""
    decoder = model.base_model
    layers, blocks = decoder_layers(decoder), inner_blocks(model)
    relaxed = [(block, *named) for block in blocks for named in block.named_children()]
    relaxed = [(block, name, norm) for block, name, norm in relaxed if isinstance(norm, RelaxedNorm)]
    place = next(name for name, child in decoder.named_children() if child is layers)
    setattr(decoder, place, nn.ModuleList(blocks))
    for block, name, norm in relaxed:
        setattr(block, name, norm.norm)
    try:
        yield
    finally:
        for block, name, norm in relaxed:
            setattr(block, name, norm)
        setattr(decoder, place, layers)
