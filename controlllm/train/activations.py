"""Activation checkpointing: what of a block is computed again in the backward pass instead of being kept."""

from functools import partial
from itertools import dropwhile
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from controlllm.control.block import ControlBlock
from controlllm.control.expand import decoder_layers
from controlllm.train.prompt import virtual_tokens_of

aten = torch.ops.aten
# What selective keeps: products and attention take nearly all of a block's time, and a part of its memory.
KEPT = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_mm.default,
    aten._grouped_mm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
)
# Of the flash-attention packages, which are there only where they are installed.
KEPT_BY_NAME = ("flash_attn::_flash_attn_varlen_forward", "flash_attn_3::fwd", "flash_attn_3::_flash_attn_forward")


def checkpoint_activations(model: Any, mode: str) -> None:
    """Let blocks keep all their activations (none), products and attention (selective) or only their inputs (full).

    In place, names stay. Blocks below the lowest trained tensor keep nothing anyhow and are left alone. To be called
    before blocks are compiled, so that the compiler sees what is computed again.
    """
    if mode == "none":
        return
    for block in blocks_with_gradient(model):
        block.forward = Recomputed(block, selective=mode == "selective")


class Recomputed:
    """A block's forward pass, of which autograd keeps the inputs (and, selective, products and attention)."""

    def __init__(self, block: nn.Module, *, selective: bool):
        self.block, self.forward = block, block.forward
        self.contexts: dict[str, Any] = {"context_fn": _contexts} if selective else {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.block.training and torch.is_grad_enabled():
            return checkpoint(partial(self.forward, **kwargs), *args, use_reentrant=False, **self.contexts)
        return self.forward(*args, **kwargs)


def blocks_with_gradient(model: Any) -> list[nn.Module]:
    """The blocks that a backward pass goes through: the lowest with a trained tensor and those above it."""
    blocks = inner_blocks(model)
    if not _trained(model.get_input_embeddings()) and virtual_tokens_of(model) is None:
        blocks = list(dropwhile(lambda block: not _trained(block), blocks))
    return blocks


def inner_blocks(model: Any) -> list[nn.Module]:
    """The family's own blocks, bottom to top; of a pair both, the twin last."""
    layers = decoder_layers(model.base_model)
    pairs = [[layer.frozen, layer.expanded] if isinstance(layer, ControlBlock) else [layer] for layer in layers]
    return [block for pair in pairs for block in pair]


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _contexts() -> Any:
    named = [name.partition("::") for name in KEPT_BY_NAME]
    packages = [getattr(getattr(torch.ops, library), op, None) for library, _, op in named]
    return create_selective_checkpoint_contexts([*KEPT, *(op.default for op in packages if op is not None)])
