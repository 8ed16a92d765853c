"""Attention over packed rows that computes nothing between documents: each one by itself, causally.

The exact twin of flash-attention's varlen call for devices without it. A mask over the whole row would do the same
work for every pair of tokens in it; most of it for pairs that must not see each other (bench/packed_attention.py).
"""

from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from controlllm.data.loader import collate
from controlllm.data.shelf import PackedRow
from controlllm.errors import UserError

NAME = "packed"
# Documents share a kernel call while the shortest has at least this share of the longest one's tokens.
SIMILAR = 0.75
# Of what models hand over to their attention: capped scores (Gemma 2), sinks (gpt-oss), biases by distance.
NOT_DONE = ("softcap", "s_aux", "position_bias")
# Two documents that refuse_leaks runs, and what the loss of one may move by: experts are rounded by who shares them.
LENGTHS = np.array([16, 16])
ROUNDING = 1e-3


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query (1, heads, tokens, head_dim), key and value with fewer heads; cu_seq_lens_q (documents + 1,) boundaries.

    A token sees itself and the `sliding_window` - 1 before it, if there is a window. ValueError for what the kernel
    underneath cannot do.
    """
    if unknown := [name for name in NOT_DONE if others.get(name) is not None]:
        raise ValueError(f"attention packed has no {unknown[0]}, which this model needs: set model.attention to eager")
    groups, restore = _plan(tuple(cu_seq_lens_q.tolist()))
    # float32 inside: more exact, and on CPUs the bfloat16 kernel is the slower one.
    inputs = [tensor[0].float() if tensor.device.type == "cpu" else tensor[0] for tensor in (query, key, value)]
    outputs = []
    for index, width in groups:
        # (heads, documents · width, head_dim) → (documents, heads, width, head_dim)
        q, k, v = (t[:, index.to(t.device)].unflatten(1, (-1, width)).transpose(0, 1) for t in inputs)
        drop = dropout if module.training else 0.0
        mask = None if sliding_window is None or width <= sliding_window else _window(width, sliding_window, q.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=drop, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        outputs.append(out.transpose(0, 1).flatten(1, 2))
    together = torch.cat(outputs, dim=1)[:, restore.to(query.device)]  # (heads, tokens, head_dim)
    return together.transpose(0, 1)[None].to(query.dtype), None  # (1, tokens, heads, head_dim)


@lru_cache(maxsize=8)
def _window(width: int, window: int, device: torch.device) -> Tensor:
    """(width, width), True where a query sees a key."""
    distance = torch.arange(width, device=device)[:, None] - torch.arange(width, device=device)
    return (distance >= 0) & (distance < window)


@lru_cache(maxsize=8)  # every block of the model asks for the same row
def _plan(edges: tuple[int, ...]) -> tuple[list[tuple[Tensor, int]], Tensor]:
    """Rectangles of token indices, one per group of documents of similar length, and the way back to the row's order.

    A shorter document is filled up at its end with its last token: under a causal mask no real token sees that.
    """
    documents = sorted(pairwise(edges), key=lambda d: d[0] - d[1])
    restore = torch.empty(edges[-1], dtype=torch.long)
    groups: list[tuple[Tensor, int]] = []
    placed = first = 0
    while first < len(documents):
        width = documents[first][1] - documents[first][0]
        last = first
        while last < len(documents) and documents[last][1] - documents[last][0] >= SIMILAR * width:
            last += 1
        rows = []
        for start, end in documents[first:last]:
            rows.append(torch.arange(start, start + width).clamp(max=end - 1))
            restore[start:end] = torch.arange(placed, placed + end - start)
            placed += width
        groups.append((torch.cat(rows), width))
        first = last
    return groups, restore


def register(*, compiled: bool = False) -> None:
    """Make `attn_implementation="packed"` known; it needs no mask. compiled: torch.compile leaves it as it is."""
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention) if compiled else packed_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def refuse_missing(attention: str, device: torch.device) -> None:
    """UserError where this machine cannot train with the kernel that `model.attention` names."""
    from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

    missing = {
        "flex_attention": device.type == "cpu" and "has no backward pass on a CPU",
        "flash_attention_2": not is_flash_attn_2_available() and "needs a GPU and the package flash-attn",
        "flash_attention_3": not is_flash_attn_3_available() and "needs a Hopper GPU and the package flash-attn-3",
    }
    if why := missing.get(attention):
        raise UserError(f"model.attention {attention} {why}; set it to packed, which works everywhere")


def refuse_leaks(model: Any, *, attention: str, vocabulary: int, device: torch.device) -> None:
    """Run two documents in one row, with one first document and with another: the second's loss must stay the same.

    model: as it is trained, called with a batch and its counts; to be called once, within its autocast. UserError
    names the setting whose kernel lets documents see each other.
    """
    first, other, second = torch.randint(vocabulary, (3, LENGTHS[0]), generator=torch.Generator().manual_seed(0))
    target = np.repeat([False, True], LENGTHS)
    losses = []
    for document in (first, other):
        row: PackedRow = {"input_ids": torch.cat([document, second]).numpy(), "lengths": LENGTHS, "target": target}
        given = collate([row]).arguments(attention)
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)  # what dropout leaves out is the same in both
            out = model(**batch, num_items_in_batch=1, num_tokens_in_batch=1, measure_divergence=False)
        losses.append(out.cross_entropy.item() / LENGTHS[1])
    if abs(losses[0] - losses[1]) > ROUNDING:
        raise UserError(
            f"model.attention {attention} lets the documents of a packed row see each other (the loss of one goes from "
            f"{losses[0]:.4f} to {losses[1]:.4f} with what stands before it); set it to packed"
        )
