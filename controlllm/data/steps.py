"""Steps that filter and change documents before they are packed: named in a recipe, added by other packages.

A step is a function with keyword options that returns a function from a document to a document, or to None to drop it.
Another package registers its own with `@step` under the entry point group `controlllm.steps`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from controlllm.data.messages import hint, kind
from controlllm.data.plugins import load_plugins
from controlllm.errors import UserError
from controlllm.fingerprint import digest, source_hash, version

if TYPE_CHECKING:
    from controlllm.data.dataset import Dataset
    from controlllm.data.types import Document

    Apply = Callable[[Document], Document | None]

Factory = TypeVar("Factory", bound=Callable)


@dataclass(frozen=True)
class Step:
    """A step with its options filled in."""

    name: str
    options: dict[str, Any]
    apply: Apply


@dataclass(frozen=True)
class ListedStep:
    """A line of `controlllm steps`."""

    name: str
    description: str
    options: dict[str, str]
    """Name → type and default, as `int = None`."""


@dataclass(frozen=True)
class _Registered:
    factory: Callable[..., Apply]
    libraries: tuple[str, ...]

    @property
    def schema(self) -> type[BaseModel]:
        hints = get_type_hints(self.factory, include_extras=True)
        fields: dict[str, Any] = {
            name: (hints[name], ... if parameter.default is parameter.empty else parameter.default)
            for name, parameter in inspect.signature(self.factory).parameters.items()
        }
        return create_model("Options", __config__=ConfigDict(extra="forbid", strict=True), **fields)


_STEPS: dict[str, _Registered] = {}


def step(name: str, *, libraries: Sequence[str] = ()) -> Callable[[Factory], Factory]:
    """Registers a step. `libraries`: distributions whose version can change what it does."""

    def add(factory: Factory) -> Factory:
        if name in _STEPS:
            first = _STEPS[name].factory.__module__
            raise UserError(f"step '{name}' is registered twice, by {first} and by {factory.__module__}: rename one")
        _STEPS[name] = _Registered(factory, tuple(libraries))
        return factory

    return add


def build_steps(preprocess: list[dict[str, dict[str, Any]]], *, where: str) -> list[Step]:
    """The steps of a recipe's list; raises UserError, which begins with the place below `where`."""
    return [_build(item, where=f"{where}.{index}") for index, item in enumerate(preprocess)]


def steps_listing() -> list[ListedStep]:
    """Everything that a recipe can name."""
    return [
        ListedStep(name, " ".join((found.factory.__doc__ or "").split()), _listed_options(found.factory))
        for name, found in sorted(_registered().items())
    ]


def step_fingerprint(steps: Sequence[Step], dataset: Dataset) -> str:
    """A hash over all that can change what the steps and the dataset make of a row: options, code and libraries."""
    from controlllm.data.code_hash import code_hash

    parts: list[Any] = [_reading(dataset)]
    for built in steps:
        found = _registered()[built.name]
        versions = {library: version(library) for library in found.libraries}
        own = code_hash(built.apply) if built.name == "function" else ""
        parts.append([built.name, built.options, code_hash(found.factory), own, versions])
    return digest(json.dumps(parts, sort_keys=True))


def _reading(dataset: Dataset) -> list[Any]:
    from controlllm.data.code_hash import code_hash
    from controlllm.data.forms import FORMS

    shared = [source_hash(Path(__file__).with_name(file)) for file in ("documents.py", "columns.py", "messages.py")]
    if dataset.function is not None:
        return [*shared, code_hash(dataset.function)]
    assert dataset.form is not None, f"dataset {dataset.name} has neither a function nor a form"
    return [*shared, dataset.form, dataset.fields, code_hash(FORMS[dataset.form].read)]


def _build(item: dict[str, dict[str, Any]], *, where: str) -> Step:
    if len(item) != 1:
        found = f"found {len(item)}: {', '.join(map(str, item))}" if item else "found none"
        raise UserError(f"{where}: one step in each item of the list, {found}")
    ((name, options),) = item.items()
    known = _registered()
    if name not in known:
        raise UserError(f"{where}: unknown step '{name}'{hint(name, known)}")
    if not isinstance(options, dict):
        raise UserError(f"{where}.{name}: must be a section of options, found {kind(options)}")
    where, found = f"{where}.{name}", known[name]
    schema = found.schema
    try:
        valid = dict(schema.model_validate(options))
    except ValidationError as error:
        raise UserError(_mistake(error, schema, where)) from None
    try:
        return Step(name, json.loads(json.dumps(valid)), found.factory(**valid))
    except ValueError as error:
        raise UserError(f"{where}{_below(str(error), valid)}") from None


def _below(message: str, options: dict[str, Any]) -> str:
    """A rule that opens with an option points at it: `keep: ...`."""
    return f"{'.' if message.partition(':')[0] in options else ': '}{message}"


def _mistake(error: ValidationError, schema: type[BaseModel], where: str) -> str:
    """The first mistake, unknown options before all others."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    first = details[0]
    # Names of the members of a union are no part of what was written.
    path = [str(part) for i, part in enumerate(first["loc"]) if i == 0 or isinstance(part, int)]
    place = ".".join([where, *path])
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown option{hint(first['loc'][0], schema.model_fields)}"
    if first["type"] == "missing":
        return f"{place}: required option is missing"
    message = first["msg"].replace("Input should", "must").replace("String should", "must")
    return f"{place}: {message}, found {json.dumps(first['input'], default=str, ensure_ascii=False)}"


def _listed_options(factory: Callable[..., Any]) -> dict[str, str]:
    options = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        default = "" if parameter.default is parameter.empty else f" = {json.dumps(parameter.default)}"
        options[name] = f"{_type_name(get_type_hints(factory)[name])}{default}"
    return options


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(_type_name, get_args(annotation)))
    plain = isinstance(annotation, type) and not get_args(annotation)
    return annotation.__name__.replace("NoneType", "None") if plain else str(annotation).replace("typing.", "")


def _registered() -> dict[str, _Registered]:
    _load()
    return _STEPS


@cache
def _load() -> None:
    """The built-in steps, and those of other packages."""
    import controlllm.data.builtin_steps  # noqa: F401 - registers them

    load_plugins("controlllm.steps")
