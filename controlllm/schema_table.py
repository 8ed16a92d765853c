"""The schema as a table to read: every key with its type, default and meaning, section by section."""

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

Node = dict[str, Any]
Row = tuple[str, str, str, str]

WIDTH_OF_A_PIPE = 160
_TYPES = {"integer": "whole number", "string": "text", "boolean": "true | false", "object": "mapping"}


def print_table(schema: Node) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_A_PIPE
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("key", no_wrap=True)
    for column in ("type", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for key, *cells in rows(schema, schema["$defs"]):
        is_section = bool(key) and not key.startswith(" ")
        if is_section:
            table.add_row()
        table.add_row(key, *cells, style="bold cyan" if is_section else "")
    console.print(table)


def rows(node: Node, definitions: Node, path: str = "") -> Iterator[Row]:
    """(key, type, default, meaning): the plain keys of a section indented below its path, then its sections."""
    required = node.get("required", ())
    sections = {name: list(_sections(field, definitions)) for name, field in node["properties"].items()}
    for name, field in node["properties"].items():
        if not sections[name]:
            default = "(required)" if name in required else json.dumps(field.get("default"))
            yield f"  {name}", _type(field), default, _meaning(field)
    for name, choices in sections.items():
        field = node["properties"][name]
        for section in choices:
            kind = f" (kind: {section['properties']['kind']['const']})" if len(choices) > 1 else ""
            item = ".0" if field.get("type") == "array" else ""
            inner = f"{path}{name}{item}"
            yield inner + kind, "section", _state(field, name in required), _meaning(section) or _meaning(field)
            yield from rows(section, definitions, f"{inner}.")


def _sections(field: Node, definitions: Node) -> Iterator[Node]:
    """The sections that a field can hold: one, one of several, or the items of a list."""
    if "$ref" in field:
        yield definitions[field["$ref"].rsplit("/", 1)[-1]]
    for inner in (*field.get("anyOf", ()), *field.get("oneOf", ())):
        yield from _sections(inner, definitions)
    if isinstance(field.get("items"), dict):
        yield from _sections(field["items"], definitions)


def _state(field: Node, required: bool) -> str:
    if required:
        return "(required)"
    if any(option.get("type") == "null" for option in field.get("anyOf", ())):
        return "off" if field["default"] is None else "on; null: off"
    return ""


def _meaning(node: Node) -> str:
    return " ".join(node.get("description", "").split())


def _type(field: Node) -> str:
    if "enum" in field or "const" in field:
        return " | ".join(map(str, field.get("enum", [field.get("const")])))
    if options := field.get("anyOf"):
        return " | ".join(dict.fromkeys(_type(option) for option in options))
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    return _TYPES.get(field["type"], str(field["type"]))
