"""Virtual tokens before every document: prompt tuning (Lester et al. 2021), prefix tuning (Li and Liang 2021).

What PEFT computes for a document alone, for every document of a packed row. The row grows by places for the virtual
tokens before its decoder sees it, and is cut again before its head does, so that labels, logits and counts keep their
places. In a prompt these places hold trained embeddings. In a prefix it does not matter what they hold: the attention
of every block takes trained keys and values there, whatever its kernel, as it would from a cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlllm.config import PromptConfig
from controlllm.control.block import attention_of
from controlllm.control.expand import decoder_layers
from controlllm.errors import UserError


class VirtualTokens(nn.Module):
    """What is trained: (tokens, width) as PEFT stores it.

    The width of a prompt is the hidden size; a prefix has, layer by layer, its keys and then its values.
    """

    def __init__(self, kind: str, weight: Tensor):
        super().__init__()
        self.kind, self.count = kind, len(weight)
        self.weight = nn.Parameter(weight)
        self.off = False

    def forward(self, documents: int) -> Tensor:
        """(documents · tokens, width). A copy: what shards the weight takes it away after this call."""
        return self.weight.repeat(documents, 1)


@dataclass(frozen=True)
class _Places:
    """Where in a grown row the virtual tokens of its documents stand, and with what keys and values."""

    virtual: Tensor  # (documents · virtual tokens,)
    states: Tensor  # (layers, 2, virtual tokens, key heads, head_dim)


def add_prompt(model: Any, prompt: PromptConfig, *, seed: int) -> None:
    """Freeze a plain model, whose weights may be on the meta device, and put virtual tokens before its documents.

    Where they start depends on the seed and the base only. ValueError for a model whose attention has no prefix.
    """
    from controlllm.train.prompt_start import embeddings_at_start, states_at_start

    start = embeddings_at_start if prompt.kind == "prompt" else states_at_start
    model.requires_grad_(False)
    attach(model, VirtualTokens(prompt.kind, start(model, prompt, seed=seed)))


def attach(model: Any, virtual: VirtualTokens) -> None:
    """Let a plain causal LM see them before every document, packed (`cu_seq_lens_q`) or a row each, and generate."""
    model.virtual_tokens = virtual
    model.config.prompt = {"kind": virtual.kind, "num_virtual_tokens": virtual.count}
    decoder = model.base_model
    plain = decoder.forward

    @wraps(plain)
    def forward(input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if virtual.off:
            return plain(input_ids=input_ids, **kwargs)
        return _with_virtual_tokens(model, plain, input_ids, kwargs)

    decoder.forward = forward
    for layer in decoder_layers(decoder) if virtual.kind == "prefix" else []:
        _let_take_prefix(attention_of(layer))


def detach(model: Any) -> VirtualTokens:
    """The plain model again; returns what it had."""
    virtual = virtual_tokens_of(model)
    assert virtual is not None
    del model.base_model.forward
    for layer in decoder_layers(model.base_model) if virtual.kind == "prefix" else []:
        del attention_of(layer).forward
    del model.virtual_tokens
    return virtual


def virtual_tokens_of(model: Any) -> VirtualTokens | None:
    """A model's virtual tokens, if it has some."""
    return getattr(model, "virtual_tokens", None)


@contextmanager
def without_virtual_tokens(model: Any) -> Iterator[None]:
    """While inside, the model computes what its base would."""
    virtual = virtual_tokens_of(model)
    assert virtual is not None
    virtual.off = True
    try:
        yield
    finally:
        virtual.off = False


def prefix_shape(config: Any) -> tuple[int, int, int]:
    """Layers, key heads and head_dim by a model's config."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, size


def _with_virtual_tokens(model: Any, plain: Callable[..., Any], input_ids: Tensor | None, kwargs: Any) -> Any:
    """The decoder's pass over the grown row; of its hidden states those of real tokens."""
    virtual: VirtualTokens = model.virtual_tokens
    row = kwargs.pop("inputs_embeds", None)
    row = model.get_input_embeddings()(input_ids) if row is None else row  # (batch, seq, hidden)
    edges, cache = kwargs.get("cu_seq_lens_q"), kwargs.get("past_key_values")
    if edges is None and cache is not None and cache.get_seq_length():
        return plain(inputs_embeds=row, **_after_prefill(kwargs, virtual.count))
    documents = 1 if edges is None else len(edges) - 1
    before, real = _places(row, edges, virtual.count)
    kwargs = _grown_batch(kwargs, virtual.count) if edges is None else _grown_row(kwargs, before, real, virtual.count)
    grown = row.new_zeros(len(row), len(before) + len(real), row.shape[2]).index_copy(1, real, row)
    if virtual.kind == "prompt":
        states = virtual(documents).to(row.dtype)
        grown = grown.index_copy(1, before, states.expand(len(row), -1, -1))
    else:
        layers, heads, size = prefix_shape(model.config)
        states = virtual(1).view(virtual.count, layers, 2, heads, size).permute(1, 2, 0, 3, 4)
        kwargs["virtual_places"] = _Places(before, states)
    out = plain(inputs_embeds=grown, **kwargs)
    out.last_hidden_state = out.last_hidden_state.index_select(1, real)
    if out.hidden_states is not None:
        out.hidden_states = tuple(state.index_select(1, real) for state in out.hidden_states)
    return out


def _places(row: Tensor, edges: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Places of the virtual and of the real tokens in the grown row; without edges a row is one document."""
    tokens, device = row.shape[1], row.device
    if edges is None:
        return torch.arange(count, device=device), torch.arange(count, count + tokens, device=device)
    number = torch.arange(1, len(edges), device=device)
    owner = torch.repeat_interleave(number, edges.diff(), output_size=tokens)
    first = edges[:-1] + count * (number - 1)
    before = (first[:, None] + torch.arange(count, device=device)).flatten()
    return before, torch.arange(tokens, device=device) + count * owner


def _grown_row(kwargs: dict[str, Any], before: Tensor, real: Tensor, count: int) -> dict[str, Any]:
    """Arguments of a packed row: documents end later, positions count the virtual tokens."""
    edges, positions = kwargs["cu_seq_lens_q"], kwargs["position_ids"]  # (documents + 1,), (1, tokens)
    documents = len(edges) - 1
    grown = positions.new_empty(1, len(before) + len(real)).index_copy(1, real, positions + count)
    own = torch.arange(count, device=positions.device, dtype=positions.dtype).repeat(documents)
    later = edges + count * torch.arange(documents + 1, device=edges.device, dtype=edges.dtype)
    changed = {"position_ids": grown.index_copy(1, before, own[None]), "cu_seq_lens_q": later}
    if "cu_seq_lens_k" in kwargs:
        changed |= {"cu_seq_lens_k": later}
        changed |= {name: kwargs[name] + count for name in ("max_length_q", "max_length_k")}
    return kwargs | changed


def _grown_batch(kwargs: dict[str, Any], count: int) -> dict[str, Any]:
    """Arguments of rows of one document each; padding on the left stands between virtual and real tokens."""
    changed = {}
    if (positions := kwargs.get("position_ids")) is not None:
        own = torch.arange(count, device=positions.device, dtype=positions.dtype).expand(len(positions), -1)
        changed["position_ids"] = torch.cat([own, positions + count], dim=1)
    mask = kwargs.get("attention_mask")
    if mask is None:
        return kwargs | changed
    if mask.ndim == 2:
        return kwargs | changed | {"attention_mask": F.pad(mask, (count, 0), value=1)}
    allowed = True if mask.dtype == torch.bool else 0.0
    wide = F.pad(mask, (count, 0), value=allowed)  # (batch, 1, seq, count + seq)
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    own = mask.new_full((count, wide.shape[-1]), hidden)
    own = torch.where(torch.ones_like(own, dtype=torch.bool).tril(), mask.new_full((), allowed), own)
    return kwargs | changed | {"attention_mask": torch.cat([own.expand(*mask.shape[:2], -1, -1), wide], dim=2)}


def _after_prefill(kwargs: dict[str, Any], count: int) -> dict[str, Any]:
    """Arguments where the cache holds the virtual tokens already."""
    changed = {}
    if (positions := kwargs.get("position_ids")) is not None:
        changed["position_ids"] = positions + count
    if (mask := kwargs.get("attention_mask")) is not None:
        changed["attention_mask"] = F.pad(mask, (count, 0), value=True if mask.dtype == torch.bool else mask.ndim == 2)
    return kwargs | changed


def _let_take_prefix(attention: Any) -> None:
    """Wrap the forward pass of an attention, which hands its keys and values to what it thinks is a cache."""
    plain = attention.forward

    @wraps(plain)
    def forward(*args: Any, virtual_places: _Places | None = None, **kwargs: Any) -> Any:
        if virtual_places is None:
            return plain(*args, **kwargs)
        prefix = _Prefix(virtual_places, kwargs.get("past_key_values"))
        out = plain(*args, **kwargs | {"past_key_values": prefix})
        if not prefix.taken:
            raise _no_prefix(attention, "keeps no keys and values of its own")
        return out

    attention.forward = forward


class _Prefix:
    """Stands where an attention expects its cache, and passes on to that cache, if there is one."""

    def __init__(self, places: _Places, cache: Any):
        self.places, self.cache, self.taken = places, cache, False

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """key and value (batch, heads, seq, head_dim), with the trained ones at the places of virtual tokens."""
        own_key, own_value = self.places.states[layer]
        key, value = self._replaced(key, own_key), self._replaced(value, own_value)
        self.taken = True
        return (key, value) if self.cache is None else self.cache.update(key, value, layer, *args, **kwargs)

    def _replaced(self, made: Tensor, own: Tensor) -> Tensor:
        count, heads, size = own.shape
        if made.shape[1::2] != (heads, size):
            found = f"has {made.shape[1]} heads of {made.shape[3]} here and {heads} of {size} by its config"
            raise UserError(f"prompt.kind prefix: the model's attention {found}; set it to prompt")
        source = own.to(made.dtype).transpose(0, 1).repeat(1, len(self.places.virtual) // count, 1)
        return made.index_copy(2, self.places.virtual, source.expand(len(made), -1, -1, -1))


def _no_prefix(attention: Any, why: str) -> UserError:
    return UserError(f"prompt.kind prefix: {type(attention).__name__} {why}, so it can see no prefix; set it to prompt")
