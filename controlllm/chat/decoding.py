"""Text as it is written, token by token."""

from collections.abc import Iterable
from typing import Any

UNFINISHED = "\ufffd"
"""What a tokenizer gives for bytes that are no whole character, yet."""


class TextStream:
    """Pieces of text that together are what the tokenizer decodes from all tokens; special tokens give nothing.

    A character of several tokens comes when its last token has come. Each piece is decoded behind the tokens before it,
    because a word's space may depend on them.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._ids: list[int] = []
        self._context = self._told = 0  # tokens [context:told) are decoded along, what follows is new

    def push(self, token: int) -> str:
        """What can be shown now."""
        if token in self._special:
            return ""
        self._ids.append(token)
        return self._new(last=False)

    def finish(self) -> str:
        """The rest, with a sign for bytes that never became a character."""
        return self._new(last=True)

    def _new(self, *, last: bool) -> str:
        before, now = self._decoded(self._ids[self._context : self._told]), self._decoded(self._ids[self._context :])
        if len(now) <= len(before) or (now.endswith(UNFINISHED) and not last):
            return ""
        self._context, self._told = self._told, len(self._ids)
        return now[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def printable(text: str) -> str:
    """Without control characters, with which a model could rewrite the terminal; lines and tabs stay."""
    return "".join(c if c in "\n\t" or not _controls(c) else UNFINISHED for c in text)


def _controls(character: str) -> bool:
    return ord(character) < 32 or 127 <= ord(character) < 160


def shared_start(one: Iterable[int], other: Iterable[int]) -> int:
    """How many tokens two sequences begin with alike."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
