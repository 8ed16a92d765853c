"""From messages to token ids and the mask of what is learned: the assistant's turns and the end-of-turn after each."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from controlllm.data.template import ChatTemplate
from controlllm.data.tokenize import SAMPLE_TEXTS, Backend, choose_backend, exact_backend
from controlllm.data.types import Document, Documents, Message, TokenBatch
from controlllm.data.writer import Writer, checked_text
from controlllm.data.written import Around, joined, to_tokens
from controlllm.errors import UserError

BLOCK = 4096  # documents that are in memory as text at once


@dataclass(frozen=True)
class Tokens:
    """One document: ids and, per token, whether it is a target; equal lengths."""

    input_ids: list[int]
    target: list[bool]


def render(
    document: Document,
    tokenizer: Any,
    *,
    targets: str = "assistant",
    date: str = "2025-01-01",
    chat_template: str | None = None,
) -> Tokens:
    """One document, the exact and slow way. UserError when nothing in it can be learned.

    The text is tokenised once, as a whole, and a token is a target where it begins within what is learned.
    """
    backend = exact_backend(tokenizer)
    if isinstance(document, str):
        around = _around(tokenizer)
        ids = [*around.front, *backend.encode([checked_text(document)])[0].tolist(), around.end]
        return Tokens(ids, [True] * len(ids))
    rendered = ChatTemplate(tokenizer, date=date, source=chat_template).render(document, targets=targets)
    ids, _, starts = backend.encode_with_starts([checked_text(rendered.text)])
    target = [any(begin <= start < end for begin, end in rendered.spans) for start in starts.tolist()]
    return Tokens(ids.tolist(), target)


def chat_text(messages: list[Message], tokenizer: Any, *, prompt: bool = False) -> str:
    """The conversation as the template writes it; with `prompt`, up to where the assistant's answer begins."""
    return ChatTemplate(tokenizer).write(messages, prompt=prompt)


class Renderer:
    """Documents to tokens, many at a time: the same as `render`, by a plan for each shape and the proven tokenizer.

    Pickles with what `prove` chose, so that every process uses the same. `chat_template` is the text of a template
    that replaces the tokenizer's. UserError for a template that is not valid.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        targets: str = "assistant",
        date: str = "2025-01-01",
        chat_template: str | None = None,
        tokenizer_mode: str = "auto",
    ):
        self._tokenizer = tokenizer
        self._mode = tokenizer_mode
        self._template = ChatTemplate(tokenizer, date=date, source=chat_template)
        self._writer = Writer(self._template, targets=targets)
        self._backend: Backend | None = None
        self._rows: Counter[str] = Counter()
        if chat_template or tokenizer.chat_template:
            self._template.tree()

    @property
    def notes(self) -> list[str]:
        """What went otherwise than planned."""
        return self._writer.notes

    def prove(self, documents: Documents) -> None:
        """Choose the tokenizer on a sample of them; UserError where there are conversations but no template."""
        count = min(SAMPLE_TEXTS, len(documents))
        chosen = [i * len(documents) // count for i in range(count)]
        if any(not isinstance(documents[i], str) for i in chosen):
            self._template.source()
        texts = self._writer.write(documents, chosen)[0].texts
        self._backend = choose_backend(self._tokenizer, texts, mode=self._mode)

    def encode(self, documents: Documents) -> TokenBatch:
        """All that can be learned from, in order; the others in `bad`, each with the reason."""
        if self._backend is None:
            self.prove(documents)
        before = self._writer.off
        rows: Counter[str] = Counter()
        batches = []
        for begin in range(0, len(documents), BLOCK):
            written, ways = self._writer.write(documents, range(begin, min(begin + BLOCK, len(documents))))
            batches.append(to_tokens(written, self._chosen(), self._around(bool(written.plain.any()))))
            rows += ways
        if self._writer.off != before:
            return self.encode(documents)  # an earlier block may have been filled in wrongly too
        self._rows += rows
        return joined(batches)

    def facts(self) -> dict[str, Any]:
        """How the documents were made, for the shard's manifest."""
        return {
            "tokenizer": self._backend and self._backend.name,
            "tokenizer_reason": self._backend and self._backend.reason,
            "plans": f"off: {self._writer.off}" if self._writer.off else "on",
            "shapes_without_plan": self._writer.refusals(),
            "rows_by_plan": self._rows["plan"],
            "rows_by_template": self._rows["template"],
            "rows_of_text": self._rows["text"],
        }

    def _chosen(self) -> Backend:
        assert self._backend is not None, "prove comes first"
        return self._backend

    def _around(self, wanted: bool) -> Around:
        return _around(self._tokenizer) if wanted else Around((), None)


def _around(tokenizer: Any) -> Around:
    """The BOS is what the tokenizer itself puts before a text; an EOS that it may put after it is not doubled."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the model's tokenizer has no EOS token: texts cannot be told apart; "
            "set eos_token in its tokenizer_config.json"
        )
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    full = tokenizer("x", add_special_tokens=True)["input_ids"]
    return Around(tuple(full[: _place(bare, full)]), tokenizer.eos_token_id)


def _place(part: Sequence[int], whole: Sequence[int]) -> int:
    """Where `part` begins in `whole`; 0 where it does not."""
    return next((i for i in range(len(whole)) if whole[i : i + len(part)] == part), 0)
