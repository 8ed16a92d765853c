"""Messages as they stand in files, and the exact reason where one cannot be used."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from controlllm.errors import UserError

if TYPE_CHECKING:  # pyarrow, which `types` needs, would double the time of `config check`
    from controlllm.data.types import Conversation, Document, Message, Row

ROLES = ("system", "developer", "user", "assistant", "tool")
SAME_ROLES = {role: role for role in ROLES}
EXTRAS = ("tool_calls", "tool_call_id", "name", "thinking", "reasoning_content")
"""What a message may hold beside role and content that a template can show; anything else is left out."""


class RowError(UserError):
    """A row that cannot be used: the field, where it is known, and the reason."""

    def __init__(self, field: str | None, reason: str):
        super().__init__(f"field '{field}': {reason}" if field else reason)
        self.field, self.reason = field, reason


def checked(value: Any) -> Document:
    """What a function made of a row, as a document; raises RowError where it is none, or has nothing to learn."""
    if isinstance(value, str):
        return filled(value, "text")
    if isinstance(value, list):
        return read_messages(value, "messages", "role", "content", SAME_ROLES)
    if isinstance(value, dict) and "messages" in value:
        return with_tools(
            read_messages(value["messages"], "messages", "role", "content", SAME_ROLES), value.get("tools"), "tools"
        )
    raise RowError(None, f"a document is text, messages or an object with messages and tools, found {kind(value)}")


def read_messages(value: Any, field: str, role_key: str, content_key: str, roles: dict[str, str]) -> list[Message]:
    """A conversation in our terms. A turn of the assistant without words makes the row bad: it would teach silence."""
    if not isinstance(value, list):
        raise RowError(field, "null" if value is None else f"must be a list of messages, found {kind(value)}")
    messages, answers = [], 0
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise RowError(
                f"{field}[{index}]", f"must be an object with {role_key} and {content_key}, found {kind(message)}"
            )
        role, content = message.get(role_key), message.get(content_key)
        known = roles.get(role) if isinstance(role, str) else None
        if known is None or not isinstance(content, str) or len(message) > 2:
            messages.append(_unusual(message, f"{field}[{index}]", role_key, content_key, roles))
        else:
            messages.append({"role": known, "content": content})
        answer = messages[-1]
        if answer["role"] == "assistant":
            answers += 1
            if not answer["content"].strip() and "tool_calls" not in answer:
                raise RowError(f"{field}[{index}].{content_key}", "empty answer")
    if not answers:
        raise RowError(field, "no assistant turn" if value else "no messages")
    return messages


def with_tools(messages: list[Message], tools: Any, field: str) -> list[Message] | Conversation:
    if tools is None or tools in ("", []):
        return messages
    listed = _objects(_json(tools, field) if isinstance(tools, str) else tools, field)
    return {"messages": messages, "tools": without_nulls(listed)} if listed else messages


def text_of(value: Any, field: str) -> str:
    if isinstance(value, str):
        return value
    raise RowError(field, "null" if value is None else f"must be text, found {kind(value)}")


def filled(value: Any, field: str) -> str:
    if not (text := text_of(value, field)) or text.isspace():
        raise RowError(field, "empty")
    return text


def missing(row: Row, field: str) -> RowError:
    """For a field that a row does not have."""
    there = [str(name) for name in row]
    near = difflib.get_close_matches(field, there, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    return RowError(field, f"missing; the row has: {', '.join(there) or 'nothing'}{guess}")


def hint(word: object, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or, where nothing is near, what there is."""
    names = list(known)
    near = difflib.get_close_matches(str(word).lower(), names, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(names)}"


def kind(value: Any) -> str:
    """What a value is, in JSON's terms."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def without_nulls(value: Any) -> Any:
    """Columnar files fill up each object with the fields of all others, as nulls; none was ever written by a person."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _unusual(message: Message, where: str, role_key: str, content_key: str, roles: dict[str, str]) -> Message:
    """A message with more than role and text, or with a mistake."""
    there = f"missing; the message has: {', '.join(map(str, message)) or 'nothing'}"
    if message.get(role_key) is None:
        raise RowError(f"{where}.{role_key}", "null" if role_key in message else there)
    role = roles.get(message[role_key]) if isinstance(message[role_key], str) else None
    if role is None:
        raise RowError(f"{where}.{role_key}", f"unknown role {message[role_key]!r:.40}; known: {', '.join(roles)}")
    extras = {key: value for key in EXTRAS if (value := without_nulls(message.get(key))) not in (None, [], "")}
    if "tool_calls" in extras:
        extras["tool_calls"] = _tool_calls(extras["tool_calls"], f"{where}.tool_calls")
    content = message.get(content_key)
    if content is None and role == "assistant" and "tool_calls" in extras:
        content = ""
    elif content is None and content_key not in message:
        raise RowError(f"{where}.{content_key}", there)
    return {"role": role, "content": _content(content, f"{where}.{content_key}"), **extras}


def _content(value: Any, where: str) -> str:
    """Text, or OpenAI's list of parts, of which only text can be trained on."""
    if not isinstance(value, list):
        return text_of(value, where)
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            what = part.get("type") if isinstance(part, dict) else kind(part)
            raise RowError(where, f"only parts of text can be used, found {what}")
    return "".join(part["text"] for part in value)


def _tool_calls(value: Any, where: str) -> list[Any]:
    """Calls with their arguments as an object: templates write JSON themselves."""
    calls = []
    for call in _objects(value, where):
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            arguments = _json(function["arguments"], f"{where}.arguments")
            function = {**function, "arguments": arguments}
            call = {**call, "function": function} if "function" in call else function
        calls.append(call)
    return calls


def _objects(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(where, f"must be a list of objects, found {kind(value)}")
    return value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(where, f"not valid JSON: {error.msg} at column {error.colno}") from None
