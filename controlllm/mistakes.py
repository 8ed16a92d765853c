"""A failed validation as one line: where it was written, the key, what was expected, what was found."""

import difflib
import json
import math
import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from controlllm.recipe import KeyPath, Source, dotted

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a section with keys below it",
    "model_type": "a section with keys below it",
    "model_attributes_type": "a section with keys below it",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-', 64 at most and not one of the signs first",
    "string_too_short": "text that is not empty",
    "too_short": "a list that is not empty",
}
_NUMBER = re.compile(r"[-+]?[0-9][0-9_]*(\.\d*)?([eE][-+]?\d+)?")


def explain(error: ValidationError, schema: type[BaseModel], *, tree: Any, source: Source) -> str:
    """The first mistake; unknown keys come first, since they often cause the others."""
    mistakes = _by_key(error, tree)
    path, details = mistakes[0]
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    where, text = _sentence(path, details, schema)
    return f"{source.locate(where)}{text}{more}"


def _by_key(error: ValidationError, tree: Any) -> list[tuple[KeyPath, list[Any]]]:
    """Details under the key that the user wrote: a union reports once for each member."""
    groups: dict[KeyPath, list[Any]] = {}
    for detail in error.errors():
        groups.setdefault(_written(detail, tree), []).append(detail)
    innermost = [
        (path, details)
        for path, details in groups.items()
        if not any(other[: len(path)] == path for other in groups if other != path)
    ]
    return sorted(innermost, key=lambda mistake: mistake[1][0]["type"] != "extra_forbidden")


def _written(detail: Any, tree: Any) -> KeyPath:
    """pydantic's location without the names of union members, which nobody wrote."""
    path: list[str | int] = []
    for part in detail["loc"]:
        if (isinstance(tree, dict) and part in tree) or (isinstance(tree, list) and isinstance(part, int)):
            path.append(part)
            tree = tree[part]  # type: ignore[index]
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    if detail["type"].startswith("union_tag"):
        path.append("kind")
    return tuple(path)


def _sentence(path: KeyPath, details: list[Any], schema: type[BaseModel]) -> tuple[KeyPath, str]:
    """Where to point, and what to say."""
    key, first = dotted(path), details[0]
    match first["type"]:
        case "extra_forbidden":
            return path, f"unknown key '{key}'{_nearest(path, schema)}"
        case "missing" | "union_tag_not_found":
            return path, f"required key '{key}' is missing"
        case "value_error":
            return _of_several(path, str(first["ctx"]["error"]), schema)
    found = first["ctx"]["tag"] if first["type"] == "union_tag_invalid" else first["input"]
    expected = " or ".join(dict.fromkeys(_expected(detail) for detail in details))
    return path, f"{key}: must be {expected}, found {_show(found)}{_hint(found, expected)}"


def _of_several(path: KeyPath, message: str, schema: type[BaseModel]) -> tuple[KeyPath, str]:
    """A rule over several keys opens with the key to point at: `num_expanded is 3 but ...`."""
    keys = tuple(message.split()[0].split("."))
    known = all(key in _fields((*path, *keys[:i]), schema) for i, key in enumerate(keys))
    text = f"{dotted(path)}{'.' if known else ': '}{message}" if path else message
    return (*path, *keys) if known else path, text


def _expected(detail: Any) -> str:
    if detail["type"].startswith("int_"):  # int_type, int_from_float, int_parsing
        return _EXPECTED["int_type"]
    if detail["type"] == "union_tag_invalid":
        return " or ".join(detail["ctx"]["expected_tags"].rsplit(", ", 1))
    message = re.sub(r"^(Input|Value|String|List) should (be|have) ", "", detail["msg"])
    return _EXPECTED.get(detail["type"], message.replace("less than or equal to", "at most"))


def _show(value: Any) -> str:
    """As the recipe has it, short, on one line."""
    if isinstance(value, dict):
        return "a section"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        text = text.replace("inf", ".inf").replace("nan", ".nan")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hint(found: Any, expected: str) -> str:
    if isinstance(found, str):
        if "number" in expected and len(found) < 40 and _NUMBER.fullmatch(found):
            return "; remove the leading zero" if re.match(r"[-+]?0\d", found) else "; remove the quotes"
        near = difflib.get_close_matches(found.lower(), re.findall(r"'([^']+)'", expected), n=1)
        return f"; did you mean '{near[0]}'?" if near else ""
    if expected == "text" and isinstance(found, int | float):
        return "; put it in quotes"
    return "; null turns an optional section off" if found is False and expected.startswith("a section") else ""


def _nearest(path: KeyPath, schema: type[BaseModel]) -> str:
    """The same key in another place, else one like it in this section, else all that could stand here."""
    known, unknown = _fields(path[:-1], schema), str(path[-1]).lower()
    here = difflib.get_close_matches(unknown, known, n=1)
    elsewhere = [dotted(other) for other in _all_keys(schema) if other[-1] == unknown]
    near = elsewhere[:1] if elsewhere and unknown not in known else here
    return f"; did you mean '{near[0]}'?" if near else f"; known here: {', '.join(known)}"


def _all_keys(schema: type[BaseModel], path: KeyPath = ()) -> Iterator[KeyPath]:
    for name, info in schema.model_fields.items():
        yield (*path, name)
        if "list" not in str(info.annotation):
            for model in _models(info.annotation):
                yield from _all_keys(model, (*path, name))


def _fields(path: KeyPath, schema: type[BaseModel]) -> list[str]:
    """Keys that may stand below `path`."""
    models: list[type[BaseModel]] = [schema]
    for part in path:
        if isinstance(part, int):
            continue
        annotations = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        models = [found for annotation in annotations for found in _models(annotation)]
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]
