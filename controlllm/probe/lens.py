"""The logit lens: what a model would say if its blocks ended early (nostalgebraist 2020)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

Json = dict[str, Any]
TOP = 3
"""Tokens that are kept of each distribution."""


def lens(model: Any, after_blocks: nn.Module | None, states: Tensor) -> Iterator[Tensor]:
    """Logits (tokens, vocabulary) in float32 for each of `states` (layers, tokens, hidden), the last one's its own.

    after_blocks: what stands between the last block and the head, the decoder's last norm. The head is the model's own
    forward pass, so that caps and scales of its logits are those of its family.
    """
    for state in states:
        hidden = state[None].to(model.device)
        with torch.no_grad(), _ending(model, hidden if after_blocks is None else after_blocks(hidden)):
            yield model(input_ids=torch.zeros(1, len(state), dtype=torch.long, device=model.device)).logits[0].float()


def followed(model: Any, after_blocks: nn.Module | None, states: Tensor) -> list[list[Json]]:
    """Per token and layer: the most likely tokens with their probabilities, and KL(final | layer) in nats."""
    logs = [torch.log_softmax(logits, dim=-1) for logits in lens(model, after_blocks, states[-1:])]
    final = logs[0]
    rows: list[list[Json]] = [[] for _ in range(states.shape[1])]
    for logits in lens(model, after_blocks, states):
        log = torch.log_softmax(logits, dim=-1)
        kl = divergence(final, log)
        best = log.topk(min(TOP, log.shape[-1]), dim=-1)
        for row, ids, values, far in zip(rows, best.indices, best.values.exp(), kl, strict=True):
            row.append({"ids": ids.tolist(), "p": values.tolist(), "kl": max(far.item(), 0.0)})
    return rows


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p | q) in nats of two sets of log probabilities (tokens, vocabulary) → (tokens,)."""
    return (p.exp() * (p - q)).sum(-1)


@contextmanager
def _ending(model: Any, hidden: Tensor) -> Iterator[None]:
    """While inside, the decoder's answer is `hidden` (batch, seq, hidden), whatever it is asked."""
    decoder = model.base_model
    own = vars(decoder).get("forward")
    ended: Any = MoeModelOutputWithPast(last_hidden_state=hidden)  # type: ignore[arg-type] - has all fields that heads ask for
    decoder.forward = lambda *_args, **_kwargs: ended
    try:
        yield
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own
