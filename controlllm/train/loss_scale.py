"""The loss scale of fp16: small gradients are multiplied into its range, and divided again before they are used."""

from collections.abc import Iterable

import torch
from torch import Tensor

from controlllm.config import TrainConfig

START = 2.0**16
GROWTH_STEPS = 2000
"""Steps without overflow after which the scale is doubled."""
LARGEST = 2.0**24
"""Where doubling ends: gradients that are all zero never overflow."""


class LossScale:
    """Halved when gradients overflow, doubled after a long time without (Micikevicius et al. 2018, arXiv 1710.03740).

    With any other precision than fp16 the scale is 1 and stays so. Nothing here looks at numbers of its own process:
    whether a step was finite is told by the loop, to all processes alike.
    """

    def __init__(self, config: TrainConfig):
        self.enabled = config.precision == "fp16"
        self.value = START if self.enabled else 1.0
        self.finite_steps = 0

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.value if self.enabled else loss

    @torch.no_grad()
    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients, in place; once, after the last backward pass and before clipping."""
        if not self.enabled:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1 / self.value)  # exact: the scale is a power of two

    def update(self, finite: bool) -> bool:
        """Adapt to whether the global gradient norm was finite.

        True if it was not and the scale explains it: leave the step out and go on. A loss that is not finite is never
        the scale's doing: it is multiplied after it was computed.
        """
        if not self.enabled:
            return False
        if finite:
            self.finite_steps += 1
            if self.finite_steps == GROWTH_STEPS:
                self.value, self.finite_steps = min(self.value * 2, LARGEST), 0
            return False
        self.finite_steps = 0
        if self.value == 1:
            return False
        self.value /= 2
        return True

    def state(self) -> dict[str, float]:
        return {"value": self.value, "finite_steps": self.finite_steps}

    def load(self, state: dict[str, float]) -> None:
        self.value, self.finite_steps = float(state["value"]), int(state["finite_steps"])
