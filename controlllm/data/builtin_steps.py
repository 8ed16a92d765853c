"""The built-in steps."""

import importlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from controlllm.data.language import LANGUAGES, LIBRARY, UNKNOWN, language_of, require
from controlllm.data.messages import hint
from controlllm.data.steps import step

if TYPE_CHECKING:
    from controlllm.data.types import Document, Message

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Role = Literal["system", "developer", "user", "assistant", "tool"]
Apply = Callable[[Any], Any]


@step("length")
def length(
    *,
    min_chars: Count = 0,
    max_chars: Positive | None = None,
    min_turns: Count = 0,
    max_turns: Positive | None = None,
) -> Apply:
    """Keeps documents with so many characters (all contents together) and so many answers of the assistant."""
    _ordered("min_chars", min_chars, "max_chars", max_chars)
    _ordered("min_turns", min_turns, "max_turns", max_turns)

    def apply(document: "Document") -> "Document | None":
        characters = sum(map(len, _contents(document)))
        turns = sum(message["role"] == "assistant" for message in _messages(document))
        if characters < min_chars or (max_chars is not None and characters > max_chars):
            return None
        if not isinstance(document, str) and (turns < min_turns or (max_turns is not None and turns > max_turns)):
            return None
        return document

    return apply


@step("language", libraries=(LIBRARY,))
def language(*, keep: list[str], unknown: Literal["keep", "drop"] = "keep") -> Apply:
    """Keeps documents in these languages (`en`, `de`, `zh`, ...); unknown are those without any letters."""
    if not keep:
        raise ValueError("keep: names no language")
    for code in keep:
        if code not in LANGUAGES:
            raise ValueError(f"keep: unknown language '{code}'{hint(code, sorted(LANGUAGES))}")
    require()
    kept = {*keep} | ({UNKNOWN} if unknown == "keep" else set())
    return lambda document: document if language_of("\n".join(_contents(document))) in kept else None


@step("regex")
def regex(*, keep: str | None = None, drop: str | None = None, role: Role | None = None) -> Apply:
    """Keeps documents in which a pattern is found, and drops those in which another is; in all turns or one role's."""
    if keep is None and drop is None:
        raise ValueError("needs keep or drop, a regular expression")
    wanted, unwanted = _pattern("keep", keep), _pattern("drop", drop)

    def apply(document: "Document") -> "Document | None":
        contents = _contents(document, role)
        if wanted and not any(map(wanted.search, contents)):
            return None
        return None if unwanted and any(map(unwanted.search, contents)) else document

    return apply


@step("replace")
def replace(*, pattern: str, by: str, role: Role | None = None) -> Apply:
    """Replaces every match of a regular expression; `by` may name groups, as in `\\1`."""
    found = _pattern("pattern", pattern)
    assert found is not None, "pattern is required"
    try:
        found.sub(by, "") if found.search("") else re.compile(f"{pattern}|").sub(by, "")
    except (re.error, IndexError) as error:
        raise ValueError(f"by: not a valid replacement: {error}") from None
    return lambda document: _changed(document, lambda text: found.sub(by, text), role)


@step("strip")
def strip() -> Apply:
    """Removes white space around each content."""
    return lambda document: _changed(document, str.strip, None)


@step("system")
def system(*, content: str | None = None, drop: bool = False, only_missing: bool = False) -> Apply:
    """Sets the system turn of conversations, of all or only of those without one; or drops it."""
    if (content is None) == (not drop):
        raise ValueError("needs either content or drop: true")

    def on(messages: list["Message"]) -> list["Message"]:
        if content is not None and only_missing and any(message["role"] == "system" for message in messages):
            return messages
        rest = [message for message in messages if message["role"] != "system"]
        return rest if content is None else [{"role": "system", "content": content}, *rest]

    return lambda document: _with_messages(document, on)


@step("max_turns")
def max_turns(*, turns: Positive) -> Apply:
    """Cuts conversations after so many messages of the user, at the last answer before the next one."""

    def apply(document: "Document") -> "Document | None":
        messages = _messages(document)
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if len(users) <= turns:
            return document
        answers = [index for index in range(users[turns]) if messages[index]["role"] == "assistant"]
        return _with_messages(document, lambda messages: messages[: answers[-1] + 1]) if answers else None

    return apply


@step("sample")
def sample(*, fraction: Annotated[float, Field(gt=0, le=1)], seed: Count = 0) -> Apply:
    """Keeps a share of the documents, chosen by their content: the same ones when rows are added."""

    def apply(document: "Document") -> "Document | None":
        import numpy as np

        from controlllm.data.keys import content_key, in_share

        return (
            document
            if in_share(np.asarray([content_key(document)], np.uint64), fraction, f"sample {seed}")[0]
            else None
        )

    return apply


@step("function")
def function(*, path: str) -> Apply:
    """Runs a function of your own, `package.module:name`, from a document to a document or None."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"path: must be like package.module:name, found '{path}'")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"path: cannot import {module}: {error}") from None
    except AttributeError:
        raise ValueError(f"path: {module} has no '{name}'") from None
    if not callable(found):
        raise ValueError(f"path: {path} is not a function")
    return found


def _ordered(lower: str, low: int, upper: str, high: int | None) -> None:
    if high is not None and low > high:
        raise ValueError(f"{lower}: {low} is above {upper}, {high}")


def _pattern(option: str, pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{option}: not a valid regular expression: {error}") from None


def _messages(document: "Document") -> list["Message"]:
    if isinstance(document, str):
        return []
    return document["messages"] if isinstance(document, dict) else document


def _contents(document: "Document", role: str | None = None) -> list[str]:
    """Contents of all turns or of one role's; a text is everyone's."""
    if isinstance(document, str):
        return [document]
    return [message["content"] for message in _messages(document) if role in (None, message["role"])]


def _with_messages(document: "Document", on: Callable[[list["Message"]], list["Message"]]) -> "Document":
    if isinstance(document, str):
        return document
    return {**document, "messages": on(document["messages"])} if isinstance(document, dict) else on(document)


def _changed(document: "Document", change: Callable[[str], str], role: str | None) -> "Document":
    if isinstance(document, str):
        return change(document)

    def on(messages: list["Message"]) -> list["Message"]:
        return [
            {**message, "content": change(message["content"])} if role in (None, message["role"]) else message
            for message in messages
        ]

    return _with_messages(document, on)
