"""Which validation of a run was the best, and whether there is still hope for a better one."""

import math
from collections.abc import Mapping
from typing import Any

from controlllm.config import BestConfig
from controlllm.errors import UserError


class Best:
    """The best value so far of one metric; plain numbers, for the checkpoint."""

    def __init__(self, config: BestConfig):
        self.config = config
        self.value: float | None = None
        self.step: int | None = None
        """Of the best validation."""
        self.without_gain = 0
        """Validations since then."""

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether this validation is the best so far; one whose value is not finite never is.

        UserError where the validation has no such metric.
        """
        self.require(metrics)
        value = float(metrics[self.config.metric])
        if not math.isfinite(value) or not self._is_gain(value):
            self.without_gain += 1
            return False
        self.value, self.step, self.without_gain = value, step, 0
        return True

    def require(self, metrics: Mapping[str, float]) -> None:
        """UserError where the validation has no such metric."""
        name = self.config.metric
        if name not in metrics:
            there = ", ".join(sorted(metrics))
            raise UserError(f"validation.best.metric: '{name}' is not measured; this run has {there}")

    def _is_gain(self, value: float) -> bool:
        if self.value is None:
            return True
        gain = self.value - value if self.config.goal == "min" else value - self.value
        return gain > self.config.min_delta

    @property
    def exhausted(self) -> bool:
        """Whether `patience` validations in a row brought no gain."""
        return self.config.patience is not None and self.without_gain >= self.config.patience

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "without_gain": self.without_gain}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self.value, self.step, self.without_gain = state["value"], state["step"], state["without_gain"]
