"""A frozen block and its trainable twin, in the place of one decoder layer."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from controlllm.control.blend import blended
from controlllm.control.divergence import DIVERGENCES, attention_divergence
from controlllm.control.interpolation import STRATEGIES
from controlllm.control.norm import relax_norms
from controlllm.control.settings import ControlSettings


class ControlBlock(nn.Module):
    """Runs both blocks on the same input and returns the blend; while measured, leaves the divergence in itself."""

    def __init__(
        self,
        frozen: nn.Module,
        settings: ControlSettings,
        *,
        hidden_size: int,
        cache_slot: int,
        shared_weights: bool = False,
    ):
        super().__init__()
        self.frozen = frozen
        self.expanded = twin_of(frozen, shared_weights=shared_weights)
        if settings.norm_relaxation != 0:
            relax_norms(self.expanded, settings.norm_relaxation)
        self.interpolation = STRATEGIES[settings.interpolation](hidden_size, alpha=settings.alpha)
        self.train_alpha = settings.train_alpha
        self.divergence_name = settings.divergence
        self.divergence_weight = settings.divergence_weight
        self.weigh_by_gate = settings.divergence_alpha == "gate"
        self.detach_teacher = settings.detach_teacher
        self.turn_to(settings.alpha_scale)
        self.alpha_scheduled = False
        self.measuring = False
        self.base_only = False
        self.token_mask: Tensor | None = None
        self.trajectory: Tensor | None = None
        self.divergence: Tensor | None = None
        # A slot of its own in the KV cache makes cached and uncached generation equal without patching a cache.
        set_layer_index(self.expanded, cache_slot)

    def turn_to(self, alpha_scale: float) -> None:
        """The dial: 0 gives the frozen block's output, 1 the blend."""
        self.alpha_scale = alpha_scale
        self.twin_only = self.interpolation.twin_only and alpha_scale == 1

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, seq, hidden) → the same."""
        if self.base_only:
            frozen = self.trajectory = self.frozen(hidden_states, *args, **kwargs)
            return frozen
        if isinstance(cache := kwargs.get("past_key_values"), Cache):
            _reserve(cache, like=layer_index(self.frozen), slot=layer_index(self.expanded))
        with _attention_maps(self, self.measuring and self.divergence_name == "attention") as maps:
            # A block that is nothing but a detached teacher needs no backward pass.
            with torch.set_grad_enabled(torch.is_grad_enabled() and not (self.detach_teacher and self.twin_only)):
                frozen = self.frozen(hidden_states, *args, **kwargs)
            expanded = self.expanded(hidden_states, *args, **kwargs)
        out = blended(
            self.interpolation,
            DIVERGENCES[self.divergence_name] if self.measuring else None,
            frozen,
            expanded,
            hidden_states,
            teacher=self.trajectory,
            detach_teacher=self.detach_teacher,
        )
        distance = self._attention_distance(*maps) if maps else out.distance
        if distance is not None:
            self.divergence = self._sum(distance, out.weights.alpha, out.weights.gate)
        if self.alpha_scale == 1:
            return out.hidden
        return torch.lerp(frozen, out.hidden, self.alpha_scale)  # at 0 exactly the frozen output

    def _attention_distance(self, frozen: Tensor, expanded: Tensor) -> Tensor:
        return attention_divergence(frozen.detach() if self.detach_teacher else frozen, expanded)

    def _sum(self, distance: Tensor, alpha: Tensor, gate: Tensor) -> Tensor:
        """Weighted sum over the tokens that count."""
        if self.weigh_by_gate:
            distance = distance * gate.squeeze(-1)
        elif self.interpolation.counts_chosen:
            distance = distance * alpha.detach().squeeze(-1)
        if self.token_mask is not None:
            distance = torch.where(self.token_mask, distance, 0.0)
        return self.divergence_weight * distance.sum()


def twin_of(block: nn.Module, *, shared_weights: bool = False) -> nn.Module:
    """A copy with tensors of its own, or whose parameters are the block's; the config stays shared, so that whoever
    sets the attention kernel sets both."""
    shared: list[Any] = [module.config for module in block.modules() if hasattr(module, "config")]
    if shared_weights:
        shared += block.parameters()
    return copy.deepcopy(block, {id(one): one for one in shared})


@contextmanager
def measuring(blocks: list[ControlBlock], token_mask: Tensor | None) -> Iterator[None]:
    """While inside, every block leaves its divergence. token_mask (batch, seq) is True where a token counts."""
    for block in blocks:
        block.measuring, block.token_mask, block.divergence, block.trajectory = True, token_mask, None, None
    try:
        yield
    finally:
        for block in blocks:
            block.measuring, block.token_mask, block.trajectory = False, None, None


def attention_of(block: nn.Module) -> nn.Module:
    """The block's attention: the innermost module that knows its layer index. ValueError says what was looked for."""
    indexed = [module for module in block.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    inner = [m for m in indexed if not any(other is not m and other in set(m.modules()) for other in indexed)]
    if len(inner) != 1:
        raise ValueError(f"{type(block).__name__}: looked for one attention with a layer_idx, found {len(inner)}")
    return inner[0]


def layer_index(block: nn.Module) -> int:
    """The slot of a block's attention in the KV cache."""
    return attention_of(block).layer_idx  # type: ignore[return-value]


def set_layer_index(block: nn.Module, index: int) -> None:
    for module in block.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = index  # type: ignore[assignment]


def _reserve(cache: Cache, *, like: int, slot: int) -> None:
    """Give the cache the twin's slot, of the frozen block's kind (copied before anything was written to it).

    Caches made from a config hold one slot per decoder layer; lazily grown ones grow by themselves.
    """
    while like < len(cache.layers) <= slot and cache.layer_class_to_replicate is None:
        cache.layers.append(copy.deepcopy(cache.layers[like]))


@contextmanager
def _attention_maps(block: ControlBlock, wanted: bool) -> Iterator[list[Tensor]]:
    """The attention maps (batch, heads, seq, keys) of the frozen block and its twin, in this order."""
    maps: list[Tensor] = []
    if not wanted:
        yield maps
        return

    def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
        if not isinstance(output, tuple) or output[1] is None:
            raise ValueError("divergence attention needs the attention maps: load the model with attention eager")
        maps.append(output[1])

    handles = [attention_of(part).register_forward_hook(keep) for part in (block.frozen, block.expanded)]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
