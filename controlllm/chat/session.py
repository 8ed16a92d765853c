"""A chat: who answers, what was said, and how the next answer is drawn."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from controlllm.chat.conversation import Conversation, Turn
from controlllm.chat.decoding import TextStream, printable
from controlllm.chat.engine import Answer, Engine, Request
from controlllm.chat.settings import Sampling, checked_alpha
from controlllm.errors import UserError


@dataclass
class Reply:
    """An answer as far as it is written."""

    name: str
    """`tuned` or `base`."""
    answer: Answer
    stream: TextStream
    prompt: int
    """Tokens of it."""
    dropped: int
    """Oldest turns that the model was not shown."""
    began: float = field(default_factory=time.perf_counter)
    text: str = ""
    tokens: int = 0
    first: float | None = None
    """Seconds to the first token."""
    seconds: float = 0.0
    done: bool = False
    stopped: bool = False

    def pieces(self) -> Iterator[str]:
        """What is new, "" while there is nothing; what the text was decoded from is at its end after the last."""
        try:
            for token in self.answer:
                if token is None:
                    yield ""
                    continue
                self._count()
                yield self._add(self.stream.push(token))
            yield self._add(self.stream.finish())
        finally:
            self.done = True

    def stop(self) -> None:
        """End it here; what is written stays."""
        self.answer.close()
        self.done = self.stopped = True

    @property
    def rate(self) -> float | None:
        """Tokens a second behind the first."""
        if self.first is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / max(self.seconds - self.first, 1e-9)

    def _add(self, text: str) -> str:
        piece = printable(text)
        self.text += piece
        return piece

    def _count(self) -> None:
        self.tokens += 1
        self.seconds = time.perf_counter() - self.began
        self.first = self.seconds if self.first is None else self.first


class Session:
    """One conversation with an engine, and with its base while they are compared."""

    def __init__(self, engine: Engine, conversation: Conversation, sampling: Sampling, stop: frozenset[int]):
        self.engine, self.conversation, self.stop = engine, conversation, stop
        self.base: Engine | None = None
        """Who answers as the base, where answers are compared."""
        self.last: list[Reply] = []
        self.dropped = 0
        """Oldest turns that the model no longer sees."""
        self.draw(sampling)

    def draw(self, sampling: Sampling) -> None:
        """How answers are drawn from now on."""
        self.sampling = sampling
        self._random = random.Random(sampling.seed)  # noqa: S311 - of sampling, nothing secret

    @property
    def one_at_a_time(self) -> bool:
        """Whether the base must be at its end before the tuned model begins."""
        return self.base is self.engine and self.engine.one_at_a_time

    def set_alpha(self, alpha: float) -> None:
        """UserError for a checkpoint without a dial."""
        if self.engine.alpha is None:
            raise UserError("alpha: this checkpoint has no dial (it has neither twins nor stacked copies)")
        self.engine.set_alpha(checked_alpha(alpha))

    def reset(self) -> None:
        self.conversation.turns.clear()
        self.last, self.dropped = [], 0

    def ask(self, message: str) -> list[Reply]:
        """The replies to be written, the base's first. UserError where the message cannot be asked."""
        seed = self._random.getrandbits(31)
        replies = [self._reply(self.base, message, seed, base=True)] if self.base else []
        return [*replies, self._reply(self.engine, message, seed, base=False)]

    def keep(self, message: str, replies: list[Reply]) -> None:
        """A turn is over. One without an answer, because it was stopped before, is as if never asked."""
        self.last = replies
        texts = {reply.name: reply.text for reply in replies}
        if texts["tuned"] or not replies[-1].stopped:
            self.conversation.turns.append(Turn(message, texts["tuned"], texts.get("base")))

    def take_back(self) -> str:
        """Forget the last turn; returns its message. UserError where there is none."""
        if not self.conversation.turns:
            raise UserError("/retry: nothing was asked yet")
        return self.conversation.turns.pop().message

    def _reply(self, engine: Engine, message: str, seed: int, *, base: bool) -> Reply:
        prompt = self.conversation.prompt(
            message, context=engine.context, max_new_tokens=self.sampling.max_new_tokens, base=base
        )
        inside = base and engine is self.engine
        request = Request(prompt.ids, prompt.room, self.sampling, seed, self.stop, base=inside)
        stream: Any = TextStream(self.conversation.writer.tokenizer)
        name = "base" if base else "tuned"
        return Reply(name, engine.answer(request), stream, len(prompt.ids), prompt.dropped)
