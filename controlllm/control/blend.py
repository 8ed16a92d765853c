"""Blend and divergence in one autograd step, keeping as little for the backward pass as can be.

Written plainly, autograd would keep both outputs, their difference and float32 copies: up to six tensors of
(batch, seq, hidden) per site. Here a site keeps one, the difference d of the two outputs in the model's dtype
(bench/step_cost.py measures it):

    blend = frozen + w·d          ∂/∂frozen = 1-w,  ∂/∂expanded = w,  ∂/∂w = ⟨gradient, d⟩
    mse   = mean(d²)              ∂/∂expanded = 2d/hidden = -∂/∂frozen

Everything else (other divergences, weights and maps that look at the outputs) is computed again from d and the blend,
which the block above keeps anyhow: frozen = blend - w·d. Only a blend that is no lerp keeps both outputs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from controlllm.control.divergence import Divergence, mse
from controlllm.control.interpolation import Interpolation, Weights


class Blended(NamedTuple):
    """What a pair gives."""

    hidden: Tensor
    """(batch, seq, hidden)"""
    weights: Weights
    distance: Tensor | None
    """(batch, seq) in float32; None where no divergence was asked for."""


def blended(
    interpolation: Interpolation,
    measure: Divergence | None,
    frozen: Tensor,
    expanded: Tensor,
    inputs: Tensor,
    *,
    teacher: Tensor | None = None,
    detach_teacher: bool,
) -> Blended:
    """Blend the outputs of a pair and measure how far they are apart; `teacher` takes the frozen output's place there.

    All hidden states (batch, seq, hidden). What autograd sees is the same as of the plain formulas.
    """
    if not torch.is_grad_enabled() or teacher is not None or _is_in_parts(interpolation):
        return _plain(interpolation, measure, frozen, expanded, inputs, teacher=teacher, detach=detach_teacher)
    if interpolation.is_lerp and not interpolation.weighs_outputs and measure in (None, mse):
        weights = interpolation.weights(frozen, expanded, inputs)
        hidden, distance = _LerpAndMse.apply(frozen, expanded, weights.alpha, measure is mse, detach_teacher)  # type: ignore[misc]
        return Blended(hidden, weights, distance)
    formulas = _Formulas(interpolation, measure, detach_teacher)
    hidden, alpha, gate, distance = _Recomputed.apply(formulas, frozen, expanded, inputs, *interpolation.parameters())  # type: ignore[misc]
    return Blended(hidden, Weights(alpha, gate), distance)


def _is_in_parts(interpolation: Interpolation) -> bool:
    """Whether ZeRO-3 gathers its parameters: for a module's own calls, and not for autograd steps around it."""
    return any(hasattr(parameter, "ds_id") for parameter in interpolation.parameters())


def _plain(
    interpolation: Interpolation,
    measure: Divergence | None,
    frozen: Tensor,
    expanded: Tensor,
    inputs: Tensor,
    *,
    teacher: Tensor | None,
    detach: bool,
) -> Blended:
    weights = interpolation.weights(frozen, expanded, inputs)
    hidden = interpolation.blend(frozen, expanded, weights.alpha)
    if measure is None:
        return Blended(hidden, weights, None)
    target = frozen if teacher is None else teacher
    return Blended(hidden, weights, measure(interpolation.teacher(target.detach() if detach else target), expanded))


class _LerpAndMse(torch.autograd.Function):
    """Closed form. alpha (1,) or (batch, seq, 1)."""

    @staticmethod
    def forward(ctx: Any, frozen: Tensor, expanded: Tensor, alpha: Tensor, measured: bool, detach: bool) -> Any:
        exact = expanded.float() - frozen.float() if measured or ctx.needs_input_grad[2] else None
        ctx.save_for_backward(None if exact is None else exact.to(frozen.dtype), alpha)
        ctx.detach = detach
        distance = exact.square().mean(-1) if measured and exact is not None else None
        return torch.lerp(frozen, expanded, alpha.to(frozen.dtype)), distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor, grad_distance: Tensor | None) -> Any:  # type: ignore[override]
        difference, alpha = ctx.saved_tensors
        weight = alpha.to(grad_hidden.dtype)
        to_frozen = (1 - weight) * grad_hidden if ctx.needs_input_grad[0] else None
        to_expanded = weight * grad_hidden
        to_alpha = None
        if ctx.needs_input_grad[2]:
            per_token = torch.linalg.vecdot(grad_hidden.float(), difference.float()).unsqueeze(-1)
            to_alpha = per_token if alpha.ndim > 1 else per_token.sum().reshape(1)
        if grad_distance is not None:
            pull = ((2 / difference.shape[-1]) * grad_distance.unsqueeze(-1) * difference).to(to_expanded.dtype)
            to_expanded = to_expanded.add_(pull)
            if to_frozen is not None and not ctx.detach:
                to_frozen = to_frozen.sub_(pull)
        return to_frozen, to_expanded, to_alpha, None, None


class _Formulas(torch.nn.Module):
    """The plain formulas as a module, so that they can be run again with the parameters that autograd kept."""

    def __init__(self, interpolation: Interpolation, measure: Divergence | None, detach: bool):
        super().__init__()
        self.interpolation, self.measure, self.detach = interpolation, measure, detach

    def forward(self, frozen: Tensor, expanded: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        out = _plain(self.interpolation, self.measure, frozen, expanded, inputs, teacher=None, detach=self.detach)
        return out.hidden, out.weights.alpha, out.weights.gate, out.distance


class _Recomputed(torch.autograd.Function):
    """Any interpolation and divergence; the parameters are inputs, so that their gradients go the usual way."""

    @staticmethod
    def forward(
        ctx: Any, formulas: _Formulas, frozen: Tensor, expanded: Tensor, inputs: Tensor, *parameters: Tensor
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.formulas = formulas
        ctx.names = [name for name, _ in formulas.named_parameters()]  # in a backward pass FSDP may hide them
        hidden, alpha, gate, distance = formulas(frozen, expanded, inputs)
        if formulas.interpolation.restorable:
            kept = hidden, expanded - frozen, *formulas.interpolation.coefficients(frozen, expanded, alpha)
        else:
            kept = frozen, expanded, None, None
        ctx.save_for_backward(*kept, inputs if formulas.interpolation.weighs_inputs else None, *parameters)
        return hidden, alpha, gate.clone(), distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override] - once_differentiable renames it
        frozen, expanded, a, b, inputs, *parameters = ctx.saved_tensors
        if a is not None:
            frozen, expanded = _restore(frozen, expanded, a, b)
        inputs = frozen if inputs is None else inputs  # some tensor of this shape: nobody reads it
        kept, needed = (frozen, expanded, inputs, *parameters), ctx.needs_input_grad[1:]
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(kept, needed, strict=True)]
        with torch.enable_grad():
            # Views, because the hooks of torch's counters and profilers may not be given leaves here.
            states = tuple(leaf.view_as(leaf) for leaf in leaves[:3])
            outputs = functional_call(ctx.formulas, dict(zip(ctx.names, leaves[3:], strict=True)), states)
        used = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad]
        given = [grad.to(out.dtype) for out, grad in used]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad([out for out, _ in used], wanted, given, allow_unused=True))
        return None, *(next(found) if leaf.requires_grad else None for leaf in leaves)


def _restore(hidden: Tensor, difference: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both outputs from their blend a·frozen + b·expanded, in float32: the difference stays what it was."""
    frozen = (hidden.float() - b * difference.float()) / (a + b)
    return frozen, frozen + difference.float()
