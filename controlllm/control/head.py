"""Output projection and cross-entropy in one autograd step, a chunk of targets at a time.

The logits of all targets, their softmax and its gradient would each take targets × vocabulary, the largest tensors of a
small model's step. Here they exist for one chunk, which gives its part of the loss and of the gradients at once:

    loss = Σ logsumexp(z) - z[target],  z = W·h + b      ∂loss/∂z = softmax(z) - onehot(target)

The backward pass only scales what the forward pass has left.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 128 << 20
"""The most that the float32 logits of one chunk take; at least half of it, so that products stay large."""

HeadLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
"""hidden (targets, hidden), weight (vocabulary, hidden), bias (vocabulary,) or None, targets (targets,) → sum ()."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, chunk: int | None = None
) -> Tensor:
    """The sum over targets of the cross-entropy of hidden @ weight.T + bias, in float32.

    hidden (targets, hidden), weight (vocabulary, hidden), bias (vocabulary,), targets (targets,), none of them ignored;
    chunk: targets at a time, by default what CHUNK_BYTES holds. Products are in autocast's type where it is on.
    """
    rows = chunk_rows(len(weight)) if chunk is None else chunk
    grads = torch.is_grad_enabled()
    return cast(Tensor, _LinearCrossEntropy.apply(hidden, weight, bias, targets, rows, grads))


def chunk_rows(vocabulary: int) -> int:
    """The largest power of two of float32 logits rows within CHUNK_BYTES."""
    return 1 << max(0, (CHUNK_BYTES // (4 * vocabulary)).bit_length() - 1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, grads: bool
    ) -> Tensor:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        wanted = [grads and need for need in ctx.needs_input_grad[:3]]
        to_hidden = torch.empty_like(hidden) if wanted[0] else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] and bias is not None else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(device, enabled=False):
            if autocast:
                weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                states = hidden[rows].to(dtype) if autocast else hidden[rows]
                part, slope = _chunk(F.linear(states, weight, bias), targets[rows], any(wanted))
                loss += part
                if to_hidden is not None:
                    to_hidden[rows] = slope @ weight
                if to_weight is not None:
                    _accumulate(to_weight, slope, states)
                if to_bias is not None:
                    to_bias += slope.sum(0, dtype=torch.float32)
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override] - once_differentiable renames it
        return *(None if left is None else left * grad.to(left.dtype) for left in ctx.saved_tensors), None, None, None


def _chunk(logits: Tensor, targets: Tensor, slope: bool) -> tuple[Tensor, Tensor]:
    """Sum of the losses of logits (rows, vocabulary), and their slope in the logits' dtype if asked for; in place."""
    exact = logits.float()
    chosen = targets[:, None]
    log_sum = exact.logsumexp(-1, keepdim=True)
    loss = (log_sum - exact.gather(1, chosen)).sum()
    if slope:
        exact.sub_(log_sum).exp_().scatter_add_(1, chosen, torch.full_like(log_sum, -1.0))
    return loss, exact.to(logits.dtype)


def _accumulate(total: Tensor, slope: Tensor, states: Tensor) -> None:
    """total += slope.T @ states, in float32."""
    if slope.dtype == torch.float32:
        total.addmm_(slope.T, states)
    else:
        total += slope.T @ states


@contextmanager
def head_gives(model: Any, loss: Callable[[Tensor, nn.Linear], Tensor]) -> Any:
    """While inside, `model`'s output projection returns loss(hidden states, itself); yields the list of its results.

    From within its own call, because that is where a sharded weight is whole. A result that comes out as the model's
    logits, the same object, shows that the family does nothing to its logits.
    """
    head = model.get_output_embeddings()
    results: list[Tensor] = []

    def forward(hidden_states: Tensor) -> Tensor:
        results.append(loss(hidden_states, head))
        return results[-1]

    head.forward = forward
    try:
        yield results
    finally:
        del head.forward


def is_linear(head: Any) -> bool:
    """Whether a module is nothing but a linear map: no adapter, no quantized or scaled product."""
    return getattr(type(head), "forward", None) is nn.Linear.forward and "forward" not in vars(head)
