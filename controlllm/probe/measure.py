"""One model over one prompt: the states after each block, what its sites do, and what its prediction hangs on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from controlllm.control.block import ControlBlock, attention_of
from controlllm.control.expand import decoder_layers, settings_of
from controlllm.probe.drift import drift


@dataclass(frozen=True)
class Site:
    """A pair of blocks over one prompt; all in float32 on the CPU."""

    alpha: Tensor  # (tokens,)
    """Weight of the twin's output, the dial's share included."""
    cosine: Tensor  # (tokens,)
    """Between the two outputs."""
    distance: Tensor  # (tokens,)
    """Length of their difference by the frozen output's."""
    maps: tuple[Tensor, Tensor] | None  # (heads, tokens, tokens) each
    """Attention of the frozen block and of its twin; None for a kind of attention that has no maps."""


@dataclass
class Seen:
    """What a pass has left."""

    states: list[Tensor] = field(default_factory=list)
    """The embeddings, then the state after each block: (tokens, hidden) each, on the CPU."""
    sites: dict[int, Site] = field(default_factory=dict)
    """By layer."""
    importance: Tensor | None = None
    """(tokens,)"""
    target: int = -1
    """The token whose logit the importance is of."""
    after_blocks: nn.Module | None = None
    """What the last block's output goes through before the head."""


@dataclass(frozen=True)
class Layer:
    """A row of every figure: the embeddings, or a block of the (expanded) model."""

    name: str
    """`in`, the base's layer number, or `7+` for a stacked copy after layer 7."""
    kind: str
    """input | block | site | copy"""


def layers_of(model: Any) -> list[Layer]:
    """Of the expanded model; the base is read at the same places, where a stacked copy gives its input again."""
    settings = settings_of(model)
    copies, pairs = (set(settings.stacked), set(settings.paired)) if settings else (set(), set())
    found, number = [Layer("in", "input")], -1
    for index in range(len(decoder_layers(model.base_model))):
        number += index not in copies
        kind = "copy" if index in copies else "site" if index in pairs else "block"
        found.append(Layer(f"{number}+" if kind == "copy" else str(number), kind))
    return found


def see(model: Any, ids: list[int], *, target: int | None = None) -> Seen:
    """One forward and one backward pass.

    The importance of a token is gradient x input: its embedding times the gradient that the logit of `target`, or of
    the predicted token, has for it. It is what the logit would change by if the embedding grew, to first order.
    """
    seen = Seen()
    row = torch.tensor([ids], device=model.device)
    embeddings = model.get_input_embeddings()(row).detach().requires_grad_()
    with torch.enable_grad(), _watching(model, seen, len(ids)):
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
        seen.target = int(logits.argmax()) if target is None else target
        (gradient,) = torch.autograd.grad(logits[seen.target].float(), embeddings)
    seen.importance = (gradient.float() * embeddings.detach().float()).sum(-1)[0].cpu()
    return seen


@contextmanager
def _watching(model: Any, seen: Seen, tokens: int) -> Iterator[None]:
    """Hooks on all blocks. Virtual tokens stand before the real ones, and are not looked at."""
    layers = decoder_layers(model.base_model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    last: list[Tensor] = []

    def on_input(_layer: nn.Module, args: Any, kwargs: Any) -> None:
        seen.states.append(_kept(args[0] if args else kwargs["hidden_states"], tokens))

    def on_output(_layer: nn.Module, _args: Any, output: Any) -> None:
        last[:] = [output[0] if isinstance(output, tuple) else output]
        seen.states.append(_kept(last[0], tokens))

    def on_other(module: nn.Module, args: Any) -> None:
        if args and last and args[0] is last[0] and len(seen.states) == len(layers) + 1:
            seen.after_blocks = module

    handles: list[Any] = [layers[0].register_forward_pre_hook(on_input, with_kwargs=True)]
    handles += [layer.register_forward_hook(on_output) for layer in layers]
    outside = [module for module in model.base_model.modules() if id(module) not in inside]
    handles += [module.register_forward_pre_hook(on_other) for module in outside]
    for index, layer in enumerate(layers):
        if isinstance(layer, ControlBlock) and not layer.base_only:
            handles += _watch_site(layer, index, seen, tokens)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_site(block: ControlBlock, index: int, seen: Seen, tokens: int) -> list[Any]:
    parts: dict[str, Tensor] = {}
    maps: list[Tensor | None] = []

    def keep(name: str) -> Any:
        return lambda _part, _args, output: parts.update({name: output[0] if isinstance(output, tuple) else output})

    def keep_map(_attention: nn.Module, _args: Any, output: Any) -> None:
        found = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        maps.append(None if found is None else found.detach()[0, :, -tokens:, -tokens:].float().cpu())

    def finish(_block: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        inputs = args[0] if args else kwargs["hidden_states"]
        seen.sites[index] = _site(block, parts["frozen"], parts["expanded"], inputs, maps, tokens)
        parts.clear()

    pairs = (("frozen", block.frozen), ("expanded", block.expanded))
    handles = [part.register_forward_hook(keep(name)) for name, part in pairs]
    handles += [attention_of(part).register_forward_hook(keep_map) for _, part in pairs]
    return [*handles, block.register_forward_hook(finish, with_kwargs=True)]


def _site(
    block: ControlBlock, frozen: Tensor, expanded: Tensor, inputs: Tensor, maps: list[Tensor | None], tokens: int
) -> Site:
    with torch.no_grad():
        alpha = block.interpolation.weights(frozen, expanded, inputs).alpha * block.alpha_scale
    alpha = alpha.float().expand(1, frozen.shape[1], 1) if alpha.ndim == 1 else alpha
    a, b = _kept(frozen, tokens).double(), _kept(expanded, tokens).double()
    lengths = torch.linalg.vector_norm(b - a, dim=-1) / torch.linalg.vector_norm(a, dim=-1)
    both = (maps[0], maps[1]) if maps[0] is not None and maps[1] is not None else None
    return Site(alpha.detach()[0, -tokens:, 0].float().cpu(), drift(a, b)[0].float(), lengths.float(), both)


def _kept(states: Tensor, tokens: int) -> Tensor:
    """(1, seq, hidden) → (tokens, hidden)"""
    return states.detach()[0, -tokens:].cpu().clone()
