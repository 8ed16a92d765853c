"""How long a run is, in steps or in tokens, and how far it has come."""

from controlllm.config import TrainConfig


class Length:
    """Pure functions of the steps done and the tokens seen."""

    def __init__(self, config: TrainConfig):
        self.steps, self.tokens = config.steps, config.tokens

    @property
    def total(self) -> int:
        """Steps, or tokens."""
        return self.tokens or self.steps or 1

    def passed(self, step: int, tokens: int) -> int:
        """Of `total`."""
        return min(tokens if self.tokens else step, self.total)

    def before(self, step: int, tokens: int, step_tokens: float) -> float:
        """0 at the first step, 1 at the last; step_tokens: of the step that comes."""
        done, size = (tokens, step_tokens) if self.tokens else (step, 1)
        return min(1.0, done / max(1.0, self.total - size))
