"""Datasets by name. A dataset is a function from a row to messages (or text, or None to drop the row).

Another package adds its own under the entry point group `controlllm.datasets`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from controlllm.config import DatasetConfig
from controlllm.errors import UserError

Message = dict[str, str]
Document = list[Message] | str
Convert = Callable[[dict[str, Any]], Document | None]


@dataclass(frozen=True)
class Dataset:
    """A source and how its rows are read."""

    name: str
    source: str
    convert: Convert
    description: str
    license: str


CATALOG: dict[str, Dataset] = {}


def dataset(name: str, *, source: str, license: str) -> Callable[[Convert], Convert]:
    """Register a dataset; the function's docstring is its description."""

    def add(convert: Convert) -> Convert:
        if name in CATALOG:
            raise ValueError(f"dataset {name!r} is registered twice")
        CATALOG[name] = Dataset(name, source, convert, (convert.__doc__ or "").strip(), license)
        return convert

    return add


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


@dataset(
    "puzzles",
    # Sizes that a model of 135 M parameters can learn within minutes.
    source="reasoning-gym://chain_sum?max_terms=2&max_digits=2+gcd+number_sorting?max_numbers=4+"
    "spell_backward?min_word_len=3&max_word_len=4",
    license="Apache-2.0",
)
def puzzles(row: dict[str, Any]) -> Document:
    """Procedural puzzles of reasoning-gym (sums, gcd, sorting, spelling backward), in any amount."""
    return [user(row["question"]), assistant(row["answer"])]


def dataset_names() -> list[str]:
    """Built-in names and those that installed packages add."""
    _load_plugins()
    return sorted(CATALOG)


def find_dataset(config: DatasetConfig) -> Dataset:
    """The catalog's entry, or one made from `source`, `format` and `fields`."""
    if config.source is not None and config.format is not None:
        convert = _by_fields(config.format, config.fields)
        return Dataset(config.name, config.source, convert, "from the recipe", "as its source says")
    if config.name not in dataset_names():
        raise UserError(f"unknown dataset '{config.name}'; known: {', '.join(dataset_names())}")
    return CATALOG[config.name]


@cache
def _load_plugins() -> None:
    for point in entry_points(group="controlllm.datasets"):
        point.load()


def _by_fields(form: str, fields: dict[str, str]) -> Convert:
    """The common forms by field names, so that a dataset usually needs no code."""

    def named(row: dict[str, Any], field: str) -> Any:
        key = fields.get(field, field)
        if row.get(key) is None:
            raise UserError(f"field '{key}' is missing or null; the row has: {', '.join(map(str, row))}")
        return row[key]

    def text(row: dict[str, Any]) -> Document:
        return _string(named(row, "text"), "text")

    def prompt_completion(row: dict[str, Any]) -> Document:
        return [
            user(_string(named(row, "prompt"), "prompt")),
            assistant(_string(named(row, "completion"), "completion")),
        ]

    def messages(row: dict[str, Any]) -> Document:
        return [_message(message) for message in named(row, "messages")]

    return {"text": text, "prompt_completion": prompt_completion, "messages": messages}[form]


def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"field '{field}' must be text, found {type(value).__name__}")
    return value


def _message(message: Any) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise UserError(f"a message needs role and content, found {message!r:.80}")
    if message["role"] not in ("system", "user", "assistant"):
        raise UserError(f"role {message['role']!r} is not one of system, user, assistant")
    return {"role": message["role"], "content": _string(message["content"], "content")}
