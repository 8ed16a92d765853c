"""A tokenizer's chat template, written by transformers itself, and where in the text each answer stands."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date as Date
from functools import partial
from typing import Any

from controlllm.data.types import Conversation, Message
from controlllm.errors import UserError

NO_TEMPLATE = "the model's tokenizer has no chat template; set pack.chat_template to one, or train on text"
# Stand for an answer and for the message before it, so that what the template itself writes can be told from them.
_ANSWER = "aNsWeR7q0Zx"
_BEFORE = "bEfOrE7q0Zx"
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it, and the characters [begin, end) of it that are learned."""

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """The slow, exact way: every text is written by the template itself, several times where spans are wanted.

    An answer begins where the prompt for it ends, and ends with the end-of-turn token that the template writes after
    it. `source` replaces the tokenizer's own template. Raises UserError for a template that is missing or broken.
    """

    def __init__(self, tokenizer: Any, *, date: str = "2025-01-01", source: str | None = None):
        self._tokenizer = tokenizer
        self._own = source
        # A name of ours in the template's scope goes before transformers' clock.
        self._names = {"strftime_now": partial(_strftime, Date.fromisoformat(date))}
        added = tokenizer.added_tokens_decoder.values()
        eos = [tokenizer.eos_token] if tokenizer.eos_token else []
        self._added = _any_of([*(str(token.content) for token in added), *eos])
        self._special = _any_of([*(str(token.content) for token in added if token.special), *eos])

    def source(self, tools: Any = None) -> str:
        """The template's text; a tokenizer may have several, one of them for tools."""
        if self._own is None and not self._tokenizer.chat_template:
            raise UserError(NO_TEMPLATE)
        try:
            return self._tokenizer.get_chat_template(self._own, tools)
        except ValueError as error:
            raise UserError(f"the chat template cannot be chosen: {_first_line(error)}") from None

    def tree(self) -> Any:
        """The template's syntax tree (jinja2.nodes.Template)."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        source = self.source()
        with _refusals():
            return _compile_jinja_template(source).environment.parse(source)

    def write(self, messages: Sequence[Message], *, tools: Any = None, prompt: bool = False) -> str:
        """The conversation; with `prompt`, up to where the next answer begins."""
        return self._tracked(messages, tools, prompt=prompt)[0]

    def render(self, document: list[Message] | Conversation, *, targets: str = "assistant") -> Rendered:
        """Text and spans. UserError where nothing is to be learned, or the spans cannot be told exactly."""
        messages, tools = (
            (document["messages"], document.get("tools")) if isinstance(document, dict) else (document, None)
        )
        if targets == "all":
            if not any(message.get("content") or message.get("tool_calls") for message in messages):
                raise UserError("the conversation has no content: nothing to learn")
            text = self.write(messages, tools=tools)
            return Rendered(text, ((0, len(text)),))
        answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if not any(messages[i].get("content") or messages[i].get("tool_calls") for i in answers):
            raise UserError("the conversation has no answer by the assistant: nothing to learn")
        if _MARKERS.search(self.source(tools)):
            return self._by_markers(messages, tools)
        text = self.write(messages, tools=tools)
        return Rendered(text, tuple(self._span(messages, i, tools, text) for i in answers))

    def _span(self, messages: Sequence[Message], index: int, tools: Any, text: str) -> Span:
        """Of answer `index` in `text`, the whole conversation as written."""
        message = messages[index]
        twin = self.write([*messages[:index], _stand_in(message, _ANSWER), *messages[index + 1 :]], tools=tools)
        first, last = twin.find(_ANSWER), twin.rfind(_ANSWER) + len(_ANSWER)
        if first < 0:
            raise UserError("the chat template drops an answer of the assistant: nothing to learn from it")
        # Tokens that close a tool call are added tokens too, but not special ones.
        token = (self._special.search(twin, last) if message.get("tool_calls") else None) or self._added.search(
            twin, last
        )
        if token is None:
            raise UserError("the chat template writes no end-of-turn token after an answer: generation would not stop")
        begin = self._begin(messages, index, tools, text, twin[:first])
        end = len(text) - (len(twin) - token.end())
        if not text.endswith(twin[token.start() :]) or begin > end:
            raise UserError(_NOT_EXACT)
        return begin, end

    def _begin(self, messages: Sequence[Message], index: int, tools: Any, text: str, ahead: str) -> int:
        """`ahead`: what is written before the content of the answer."""
        if index:
            prompt = self.write(messages[:index], tools=tools, prompt=True)
            if text.startswith(prompt):
                return len(prompt)
        # Earlier turns are written otherwise now: the answer begins after its header, if that can be told.
        opening = messages[:index] or [{"role": "user", "content": _BEFORE}]
        prompt = self.write(opening, tools=tools, prompt=True)
        closed = self.write(opening, tools=tools)
        header = prompt[
            next((i for i, pair in enumerate(zip(prompt, closed, strict=False)) if len({*pair}) > 1), len(closed)) :
        ]
        lead, between = header, ahead
        if index:
            before = [*messages[: index - 1], _stand_in(messages[index - 1], _BEFORE)]
            twin = self.write([*before, _stand_in(messages[index], _ANSWER), *messages[index + 1 :]], tools=tools)
            lead = self.write(before, tools=tools, prompt=True).rpartition(_BEFORE)[2]
            between = twin[: twin.find(_ANSWER)].rpartition(_BEFORE)[2]
        place = between.find(lead)
        begin = len(ahead) - len(between) + place + len(lead)
        exact = between.startswith(lead) if index else between.count(lead) == 1
        if not header or not exact or not text.startswith(ahead[:begin]):
            raise UserError(_NOT_EXACT)
        return begin

    def _by_markers(self, messages: Sequence[Message], tools: Any) -> Rendered:
        """Spans as the template's `{% generation %}` marks them, through the end-of-turn token that follows each."""
        text, spans = self._tracked(messages, tools)
        twins = [_stand_in(m, _ANSWER) if m.get("role") == "assistant" else m for m in messages]
        twin, twin_spans = self._tracked(twins, tools)
        if len(spans) != len(twin_spans):
            raise UserError(_NOT_EXACT)
        if not any(_ANSWER in twin[begin:end] for begin, end in twin_spans):
            raise UserError("the chat template drops the answers of the assistant: nothing to learn from them")
        learned = []
        for (begin, end), (twin_begin, twin_end) in zip(spans, twin_spans, strict=True):
            answer = twin.rfind(_ANSWER, twin_begin, twin_end)
            token = self._added.search(twin, answer) if answer >= 0 else None
            if answer >= 0 and (token is None or twin[twin_end : token.start()].strip()):
                raise UserError(
                    "the chat template writes no end-of-turn token after an answer: generation would not stop"
                )
            learned.append((begin, end + max(0, token.end() - twin_end) if token else end))
        return Rendered(text, tuple(learned))

    def _tracked(self, messages: Sequence[Message], tools: Any, *, prompt: bool = False) -> tuple[str, list[Span]]:
        """Through transformers, with the spans that markers give."""
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.source(tools)
        tracking = bool(_MARKERS.search(source))
        names: dict[str, Any] = {**self._tokenizer.special_tokens_map, **self._names}
        with _refusals():
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=source,
                return_assistant_tokens_mask=tracking,
                add_generation_prompt=prompt,
                **names,
            )
        return texts[0], list(spans[0]) if tracking else []  # type: ignore[return-value] - its annotation is wrong


@contextmanager
def _refusals() -> Iterator[None]:
    """What a template says against a conversation, or what is wrong with it, as one line."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        yield
    except TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is not valid: line {error.lineno}: {error.message}; "
            "set pack.chat_template to one that is"
        ) from None
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise UserError(f"the chat template refuses the conversation: {_first_line(error)}") from None


_NOT_EXACT = (
    "the chat template writes earlier turns differently once an answer follows; labels are not exact; "
    "give pack.chat_template one that does not"
)


def _stand_in(message: Message, mark: str) -> Message:
    """The same message with `mark` for what it says."""
    calls = message.get("tool_calls")
    content = message.get("content")
    changed: Message = {"tool_calls": [_marked_call(call, mark) for call in calls]} if calls else {}
    if isinstance(content, list):
        changed["content"] = [{**part, "text": mark} if "text" in part else part for part in content]
    elif content or not calls:
        changed["content"] = mark
    return {**message, **changed}


def _marked_call(call: dict[str, Any], mark: str) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _marked_call(call["function"], mark)}
    return {**call, "arguments": mark if isinstance(call.get("arguments"), str) else {mark: mark}}


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """The longest of them; a pattern that never matches for none."""
    longest_first = sorted({token for token in tokens if token}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _strftime(day: Date, format: str) -> str:
    return day.strftime(format)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
