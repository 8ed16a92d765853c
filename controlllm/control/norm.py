"""The relaxed norm of a twin: part of the input passes by the norm."""

from typing import Any

import torch
from torch import Tensor, nn


class RelaxedNorm(nn.Module):
    """λ·x + (1-λ)·norm(x), with λ constant, or learned as 2·sigmoid(θ) - 1 clamped to 0..1, from θ = 0 on."""

    def __init__(self, norm: nn.Module, relaxation: float | str):
        super().__init__()
        self.norm = norm
        self.constant = None if isinstance(relaxation, str) else relaxation
        if self.constant is None:
            self.relaxation_logit = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, seq, hidden) → the same."""
        share: Any = self.constant
        if share is None:
            share = torch.clamp(2 * torch.sigmoid(self.relaxation_logit.float()) - 1, 0, 1).to(hidden_states.dtype)
        return share * hidden_states + (1 - share) * self.norm(hidden_states)


def relax_norms(block: nn.Module, relaxation: float | str, kind: type[RelaxedNorm] = RelaxedNorm) -> None:
    """Relax the norms that are direct children of a block (not those inside its attention), in place."""
    for name, module in list(block.named_children()):
        if type(module).__name__.endswith("Norm"):
            setattr(block, name, kind(module, relaxation))
