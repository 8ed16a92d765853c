"""How a frozen block's output and its twin's are blended. A new way is a small class registered here."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Interpolation(nn.Module):
    """Blend two hidden states; built as `Interpolation(hidden_size, alpha=..., train_alpha=...)`."""

    def __init__(self, hidden_size: int, *, alpha: float, train_alpha: bool):
        super().__init__()

    def forward(self, frozen: Tensor, expanded: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, seq, hidden) each → the blend, and alpha, the weight of `expanded`, 0..1, that broadcasts to it."""
        raise NotImplementedError  # every registered class has its own


STRATEGIES: dict[str, type[Interpolation]] = {}


def strategy(name: str) -> Callable[[type[Interpolation]], type[Interpolation]]:
    """Register an interpolation under the name that `control.interpolation` uses."""

    def add(cls: type[Interpolation]) -> type[Interpolation]:
        if name in STRATEGIES:
            raise ValueError(f"interpolation {name!r} is registered twice")
        STRATEGIES[name] = cls
        return cls

    return add


@strategy("lerp")
class Lerp(Interpolation):
    """(1 - w)·frozen + w·expanded with one weight w = sigmoid(θ) per site (equation 3 of the paper)."""

    def __init__(self, hidden_size: int, *, alpha: float = 0.5, train_alpha: bool = True):
        super().__init__(hidden_size, alpha=alpha, train_alpha=train_alpha)
        self.alpha_logit = nn.Parameter(torch.tensor([math.log(alpha / (1 - alpha))]), requires_grad=train_alpha)

    def forward(self, frozen: Tensor, expanded: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        alpha = torch.sigmoid(self.alpha_logit).to(frozen.dtype)
        # torch.lerp of two equal values is that value exactly: the expanded model starts as the base, bitwise.
        return torch.lerp(frozen, expanded, alpha), alpha
