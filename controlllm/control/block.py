"""A frozen block and its trainable twin, in the place of one decoder layer."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from controlllm.control.divergence import DIVERGENCES
from controlllm.control.interpolation import STRATEGIES
from controlllm.control.settings import ControlSettings


class ControlBlock(nn.Module):
    """Runs both blocks on the same input and returns the blend; leaves the divergence in `self.divergence`."""

    def __init__(self, frozen: nn.Module, settings: ControlSettings, *, hidden_size: int, cache_slot: int):
        super().__init__()
        self.frozen = frozen
        self.expanded = copy.deepcopy(frozen)
        self.interpolation = STRATEGIES[settings.interpolation](
            hidden_size, alpha=settings.alpha, train_alpha=settings.train_alpha
        )
        self.train_alpha = settings.train_alpha
        self.measure = DIVERGENCES[settings.divergence]
        self.detach_teacher = settings.detach_teacher
        self.divergence: Tensor | None = None
        # A slot of its own in the KV cache makes cached and uncached generation equal without patching a cache.
        attention_of(self.expanded).layer_idx = cache_slot  # type: ignore[assignment]

    def forward(self, hidden_states: Tensor, *args: Any, token_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(batch, seq, hidden) → the same. `token_mask` (batch, seq) is True where a token counts."""
        if isinstance(cache := kwargs.get("past_key_values"), Cache):
            _reserve(cache, like=attention_of(self.frozen).layer_idx, slot=attention_of(self.expanded).layer_idx)  # type: ignore[arg-type]
        frozen = self.frozen(hidden_states, *args, **kwargs)
        expanded = self.expanded(hidden_states, *args, **kwargs)
        blend, _alpha = self.interpolation(frozen, expanded, hidden_states)
        if self.training and self.measure is not None:
            teacher = frozen.detach() if self.detach_teacher else frozen
            self.divergence = _sum(self.measure(teacher, expanded), token_mask)
        return blend


def attention_of(block: nn.Module) -> nn.Module:
    """The block's attention: the one module inside it that knows its layer index."""
    found = [module for module in block.modules() if hasattr(module, "layer_idx")]
    if len(found) != 1:
        raise ValueError(
            f"{type(block).__name__} has {len(found)} modules with a layer_idx; one attention was expected"
        )
    return found[0]


def _sum(per_token: Tensor, mask: Tensor | None) -> Tensor:
    return per_token.sum() if mask is None else torch.where(mask, per_token, 0.0).sum()


def _reserve(cache: Cache, *, like: int, slot: int) -> None:
    """Give the cache the twin's slot, of the frozen block's kind (copied before anything was written to it).

    Caches made from a config hold one slot per decoder layer; lazily grown ones grow by themselves.
    """
    while like < len(cache.layers) <= slot and cache.layer_class_to_replicate is None:
        cache.layers.append(copy.deepcopy(cache.layers[like]))
