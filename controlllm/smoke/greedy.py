"""A greedy answer, whoever gave it."""

from dataclasses import dataclass

Likely = list[tuple[int, float]]
"""The likeliest tokens at a place and their log-probabilities, the likeliest first."""


@dataclass(frozen=True)
class Greedy:
    """Tokens with the EOS that ended them, and for each its log-probability and the two that were likeliest there."""

    tokens: list[int]
    logprobs: list[float]
    likely: list[Likely]
    finish: str
    """stop (at an EOS) or length."""
