"""What was said so far, and how much of it a model is shown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from controlllm.data.template import ChatTemplate
from controlllm.errors import UserError

Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A message and what was answered; the base has its own answer where it was asked, too."""

    message: str
    answer: str
    base_answer: str | None = None

    def seen_by(self, *, base: bool) -> str:
        """The answer as the model remembers it."""
        return self.answer if not base or self.base_answer is None else self.base_answer


@dataclass(frozen=True)
class Prompt:
    """Token ids up to where the answer begins."""

    ids: list[int]
    dropped: int
    """Oldest turns that had no place."""
    room: int
    """Tokens that an answer may have."""


class Writer:
    """Conversations as the tokenizer's chat template writes them; as plain text where there is no template."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        self._template = ChatTemplate(tokenizer, date=datetime.now(UTC).date().isoformat())

    def ids(self, system: str | None, turns: Sequence[Turn], message: str, *, base: bool) -> list[int]:
        """Of the whole conversation with a new message. UserError where the template refuses it."""
        if self.has_template:
            text = self._template.write(messages_of(system, turns, message, base=base), prompt=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        text = plain_text(turns, base=base) + message
        return self._without_end(self.tokenizer(text)["input_ids"])

    def _without_end(self, ids: list[int]) -> list[int]:
        """Some tokenizers end every text; it is to go on here."""
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids


@dataclass
class Conversation:
    """The turns, all of them: what the model is shown may be fewer."""

    writer: Writer
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def prompt(self, message: str, *, context: int | None, max_new_tokens: int, base: bool = False) -> Prompt:
        """With as many of the newest turns as leave room for the answer; a turn is shown whole or not at all.

        context: tokens of prompt and answer together, None without a limit. UserError for a message that does not fit
        by itself, or has no token.
        """
        wanted = max_new_tokens if context is None else min(max_new_tokens, max(1, context // 2))
        dropped, ids = 0, self.writer.ids(self.system, self.turns, message, base=base)
        while context is not None and len(ids) + wanted > context and dropped < len(self.turns):
            dropped += 1
            ids = self.writer.ids(self.system, self.turns[dropped:], message, base=base)
        if not ids:
            raise UserError("the message is empty: it has no token")
        room = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
        if room < 1:
            system = " with the system message" if self.system else ""
            raise UserError(
                f"the message is {len(ids):,} tokens long{system}; the context holds {context:,}, with the answer"
            )
        return Prompt(ids, dropped, room)

    def messages(self) -> list[Message]:
        return messages_of(self.system, self.turns)

    def text(self) -> str:
        return plain_text(self.turns, base=False)


def messages_of(
    system: str | None, turns: Sequence[Turn], message: str | None = None, *, base: bool = False
) -> list[Message]:
    return list(_messages(system, turns, message, base=base))


def plain_text(turns: Sequence[Turn], *, base: bool) -> str:
    """One text that goes on, for models that know no turns."""
    return "".join(turn.message + turn.seen_by(base=base) for turn in turns)


def _messages(system: str | None, turns: Sequence[Turn], message: str | None, *, base: bool) -> Iterator[Message]:
    if system:
        yield _message("system", system)
    for turn in turns:
        yield _message("user", turn.message)
        yield _message("assistant", turn.seen_by(base=base))
    if message is not None:
        yield _message("user", message)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
