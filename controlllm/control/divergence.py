"""How far a twin's hidden states have moved from the frozen block's, per token."""

from collections.abc import Callable

from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]


def mse(frozen: Tensor, expanded: Tensor) -> Tensor:
    """(batch, seq, hidden) twice → (batch, seq): mean over hidden of the squared difference, in float32."""
    return (frozen.float() - expanded.float()).pow(2).mean(-1)


DIVERGENCES: dict[str, Divergence | None] = {"mse": mse, "none": None}
