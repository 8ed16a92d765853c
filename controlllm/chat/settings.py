"""How an answer is drawn, and which values that takes."""

from dataclasses import dataclass, replace

from controlllm.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Of one answer."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None
    """Of the chat: the same one gives the same answers to the same messages; none draws anew each time."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature: {self.temperature:g} is not within 0 (greedy) .. 100")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p:g} is not above 0 and at most 1 (all tokens)")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {self.max_new_tokens} is not at least 1")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"seed: {self.seed} is negative; give a whole number from 0 on")

    def changed(self, name: str, text: str) -> "Sampling":
        """With one value as it was typed. UserError for a name or value that cannot be."""
        name = name.replace("-", "_")
        if name not in KINDS:
            raise UserError(f"/set: there is no '{name}'; there are {', '.join(KINDS)}")
        try:
            value = KINDS[name](text)
        except ValueError:
            kind = "a number" if KINDS[name] is float else "a whole number"
            raise UserError(f"{name}: '{text}' is not {kind}") from None
        return replace(self, **{name: value})


KINDS = {"temperature": float, "top_p": float, "max_new_tokens": int, "seed": int}


def checked_alpha(alpha: float) -> float:
    """UserError for a scale that is no share."""
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha: {alpha:g} is not within 0 (the base model) .. 1 (the trained model)")
    return alpha
