"""What a model is asked in tokens, and what whatever runs it answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Answer = tuple[float, bool]  # (log-likelihood of the continuation, whether greedy decoding gives it)


@dataclass(frozen=True)
class Pair:
    """A continuation that is scored after its context. Together at most one token longer than the model's length."""

    context: list[int]
    continuation: list[int]

    @property
    def longest(self) -> int:
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True)
class Prompt:
    """A text to go on with; temperature 0 is greedy. `seed` makes repeated samples of one prompt differ."""

    tokens: list[int]
    max_new_tokens: int
    until: list[str] = field(default_factory=list)
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    @property
    def longest(self) -> int:
        return len(self.tokens) + self.max_new_tokens


class Engine(Protocol):
    """What runs the model: Pairs give Answers, Prompts give new tokens (without the EOS that ended them)."""

    name: str
    """For people: what runs the model."""

    def plan(self, requests: Sequence[Any]) -> list[list[int]]:
        """The places of requests that are answered together, batch by batch."""
        ...

    def run(self, batches: Sequence[Sequence[Any]]) -> Iterator[tuple[int, list[Any]]]:
        """(number of the batch, its answers), in the order in which they are done."""
        ...
