"""What writes answers, whatever runs the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from controlllm.chat.settings import Sampling


@dataclass(frozen=True)
class Request:
    """One answer that is wanted."""

    ids: list[int]
    room: int
    """Most tokens of it."""
    sampling: Sampling
    seed: int
    stop: frozenset[int]
    """Tokens that end it, and are no part of it."""
    base: bool = False
    """By the base that the model holds in itself."""


class Answer(Protocol):
    """Tokens one after another, and None now and then while there is none yet; `close` ends it before its time."""

    reused: int
    """Tokens of the prompt that were not computed again; known with the first token."""

    def __iter__(self) -> Iterator[int | None]: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """A model that answers."""

    about: str
    """Type, device and what runs it, for people."""
    context: int | None
    """Tokens of a prompt and its answer together; None without a limit."""
    holds_base: bool
    """Whether it can answer as its base, too."""
    alpha: float | None
    """Where the dial stands; None for a model without one."""
    one_at_a_time: bool
    """Whether an answer must be at its end before the next begins."""

    def answer(self, request: Request) -> Answer: ...

    def set_alpha(self, alpha: float) -> None:
        """Only where there is a dial."""
        ...

    def close(self) -> None: ...
