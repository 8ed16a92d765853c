"""The common forms of rows, one row at a time, so that a dataset usually needs no code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from controlllm.data.messages import SAME_ROLES, filled, hint, missing, read_messages, text_of, with_tools
from controlllm.errors import UserError

if TYPE_CHECKING:  # pyarrow, which `types` needs, would double the time of `config check`
    from controlllm.data.types import Document, Message, Row

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
Convert = Callable[["Row"], "Document | None"]
Names = dict[str, str]
"""Field of the form → field of the source."""


@dataclass(frozen=True)
class Form:
    """A form and its fields."""

    read: Callable[[Row, Names, frozenset[str]], Document]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()  # fields of each message

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.required, *self.optional, *self.inner)


def form_names(form: str, fields: dict[str, str], *, where: str) -> Names:
    """Every field of the form → what the source calls it. Raises UserError, which begins with `where`."""
    known = FORMS[form].fields
    for field in fields:
        if field not in known:
            raise UserError(f"{where}: '{field}' is no field of format {form}{hint(field, known)}")
    return {field: fields.get(field, field) for field in known}


def form_reader(form: str, fields: dict[str, str], *, where: str) -> Convert:
    """A function from a row to its document; it raises RowError."""
    names, asked, read = form_names(form, fields, where=where), frozenset(fields), FORMS[form].read
    return lambda row: read(row, names, asked)


def _read_messages(row: Row, names: Names, asked: frozenset[str]) -> Document:
    messages = _value(row, names["messages"])
    document = read_messages(messages, names["messages"], names["role"], names["content"], SAME_ROLES)
    return with_tools(document, _optional(row, "tools", names, asked), names["tools"])


def _read_sharegpt(row: Row, names: Names, asked: frozenset[str]) -> Document:
    field = names["conversations"]
    document = read_messages(_value(row, field), field, names["from"], names["value"], SHAREGPT_ROLES)
    system = _optional_text(row, "system", names, asked)
    if system and document[0]["role"] != "system":
        document.insert(0, {"role": "system", "content": system})
    return with_tools(document, _optional(row, "tools", names, asked), names["tools"])


def _read_alpaca(row: Row, names: Names, asked: frozenset[str]) -> Document:
    prompt = text_of(_value(row, names["instruction"]), names["instruction"])
    given = _optional_text(row, "input", names, asked)
    answer = filled(_value(row, names["output"]), names["output"])
    return _turns(_optional_text(row, "system", names, asked), f"{prompt}\n\n{given}" if given else prompt, answer)


def _read_prompt_completion(row: Row, names: Names, asked: frozenset[str]) -> Document:
    prompt = text_of(_value(row, names["prompt"]), names["prompt"])
    answer = filled(_value(row, names["completion"]), names["completion"])
    return _turns(_optional_text(row, "system", names, asked), prompt, answer)


def _read_text(row: Row, names: Names, asked: frozenset[str]) -> Document:
    return filled(_value(row, names["text"]), names["text"])


FORMS: dict[str, Form] = {
    "messages": Form(_read_messages, ("messages",), ("tools",), ("role", "content")),
    "sharegpt": Form(_read_sharegpt, ("conversations",), ("system", "tools"), ("from", "value")),
    "alpaca": Form(_read_alpaca, ("instruction", "output"), ("input", "system")),
    "prompt_completion": Form(_read_prompt_completion, ("prompt", "completion"), ("system",)),
    "text": Form(_read_text, ("text",)),
}


def _turns(system: str | None, prompt: str, answer: str) -> list[Message]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": system}, *turns] if system else turns


def _value(row: Row, field: str) -> Any:
    if field not in row:
        raise missing(row, field)
    return row[field]


def _optional(row: Row, field: str, names: Names, asked: frozenset[str]) -> Any:
    """None where there is none; a field that the recipe names must be there."""
    name = names[field]
    if name not in row and field in asked:
        raise missing(row, name)
    return row.get(name)


def _optional_text(row: Row, field: str, names: Names, asked: frozenset[str]) -> str | None:
    value = _optional(row, field, names, asked)
    return None if value is None or not text_of(value, names[field]).strip() else value
