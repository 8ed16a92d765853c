"""How far a twin has moved from its frozen block, per token: (batch, seq, hidden) twice → (batch, seq), in float32."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]


def mse(frozen: Tensor, expanded: Tensor) -> Tensor:
    """Mean over hidden of the squared difference."""
    return (frozen.float() - expanded.float()).pow(2).mean(-1)


def cosine(frozen: Tensor, expanded: Tensor) -> Tensor:
    """Smooth-L1 of d = relu(1 - cos): d²/2 below 1, d - 1/2 above."""
    distance = F.relu(1 - F.cosine_similarity(frozen.float(), expanded.float(), dim=-1, eps=1e-8))
    return F.smooth_l1_loss(distance, torch.zeros_like(distance), reduction="none")


def dot(frozen: Tensor, expanded: Tensor) -> Tensor:
    """Half of `cosine`, half of the squared difference of lengths."""
    lengths = torch.linalg.vector_norm(frozen.float(), dim=-1) - torch.linalg.vector_norm(expanded.float(), dim=-1)
    return 0.5 * cosine(frozen, expanded) + 0.5 * lengths.square()


DIVERGENCES: dict[str, Divergence | None] = {"mse": mse, "cosine": cosine, "dot": dot, "attention": None, "none": None}


def attention_divergence(frozen: Tensor, expanded: Tensor) -> Tensor:
    """KL(expanded | frozen) of two attention maps (batch, heads, seq, keys), mean over heads → (batch, seq)."""
    frozen, expanded = frozen.float(), expanded.float()
    logs = torch.log(expanded + 1e-8) - torch.log(frozen + 1e-8)  # a masked key has weight 0 in both
    return (expanded * logs).sum(-1).mean(1)
