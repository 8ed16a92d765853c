"""Recipes as text: strict YAML with line numbers, overrides from the command line, and back to text."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from controlllm.errors import UserError

KeyPath = tuple[str | int, ...]

MAX_CHARACTERS = 1_000_000


@dataclass
class Source:
    """Where each key was written, for messages."""

    file: str = ""
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    def locate(self, path: KeyPath) -> str:
        """`demo.yaml:12: ` for the deepest part of the path that was written anywhere."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.overrides:
                return f"override '{self.overrides[path[:end]]}': "
            if path[:end] in self.lines:
                return f"{self.file}:{self.lines[path[:end]]}: "
        return f"{self.file}: " if self.file else ""

    def replace(self, path: KeyPath, override: str) -> None:
        """From now on `override` is where the path, and all that is below it, was written."""
        self.lines = {key: line for key, line in self.lines.items() if key[: len(path)] != path}
        self.overrides = {key: text for key, text in self.overrides.items() if key[: len(path)] != path}
        for end in range(1, len(path)):  # sections that did not exist before
            if path[:end] not in self.lines:
                self.overrides.setdefault(path[:end], override)
        self.overrides[path] = override


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: `1e-4` is a number; `on`, `010`, `1:30` and dates are text, not surprises."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's way to drop YAML 1.1's

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refused("aliases (*name) are not allowed; write the value out", event.start_mark)
        if (tag := getattr(event, "tag", None)) is not None:
            tag = tag.replace("tag:yaml.org,2002:", "!!")
            raise _refused(f"the tag {tag} is not allowed; recipes hold plain values only", event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever another reader, of YAML 1.1 or 1.2, could take for a number, a date or a flag."""


_FLOAT = r"[-+]?(\.\d+|\d+\.\d*)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("null", "~|null|Null|NULL|", "~nN"),
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]{0,4000})", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
):
    for _class in (_Loader, _Dumper):
        _letters = [*_first, ""] if _tag == "null" else list(_first)
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), _letters)


def read(recipe: Path, *overrides: str) -> tuple[dict[str, Any], Source]:
    """A recipe with `section.key=value` overrides applied left to right, not yet validated."""
    return apply(*read_recipe(recipe), *overrides)


def apply(tree: dict[str, Any], source: Source, *overrides: str) -> tuple[dict[str, Any], Source]:
    """A tree with `section.key=value` overrides applied left to right, and where everything in it now stands."""
    for override in overrides:
        path, value = read_override(override)
        tree = _replace(tree, path, value, override)
        source.replace(path, override)
    return tree, source


def read_recipe(file: Path) -> tuple[dict[str, Any], Source]:
    """Parse a recipe. Raises UserError for anything that is not one plain YAML mapping without repeats and tags."""
    tree, lines = _parse(_read_text(file), str(file))
    if tree is None:
        raise UserError(f"{file}: the recipe is empty; start from workflows/recipes/demo.yaml")
    if not isinstance(tree, dict):
        found = "a list" if isinstance(tree, list) else "a single value"
        raise UserError(f"{file}: a recipe is a mapping of sections (name:, model:, train:, ...), found {found}")
    return tree, Source(file=str(file), lines=lines)


def read_override(text: str) -> tuple[KeyPath, Any]:
    """`train.lr=1e-4` as (("train", "lr"), 0.0001); a number in the path is a list index."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.([A-Za-z_][\w-]*|\d{1,6}))*", key.strip(), re.ASCII):
        raise UserError(f"override '{text}': expected section.key=value, for example train.lr=1e-4")
    parsed, _ = _parse(value, f"override '{text}'", numbered=False)
    return tuple(int(part) if part.isdigit() else part for part in key.strip().split(".")), parsed


def write(tree: dict[str, Any]) -> str:
    """YAML that `read_recipe` reads back to an equal tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=1000)


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _read_text(file: Path) -> str:
    try:
        if not file.exists():
            near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], n=1)
            hint = f"; did you mean {file.parent / near[0]}?" if near else ""
            raise UserError(f"{file}: no such recipe{hint}")
        if file.is_dir():
            raise UserError(f"{file}: is a directory; give a recipe file such as {file / 'demo.yaml'}")
        with file.open(encoding="utf-8-sig") as stream:
            text = stream.read(MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); recipes are YAML text") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{file}: longer than {MAX_CHARACTERS} characters: this is no recipe")
    return text


def _parse(text: str, name: str, *, numbered: bool = True) -> tuple[Any, dict[KeyPath, int]]:
    """The value in a YAML text, and the line on which each key stands."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines = dict(_walk(node, name, numbered))
        return loader.construct_document(node), lines
    except yaml.YAMLError as error:
        line = _line(error, text)
        at = f":{line}" if numbered and line else ""
        raise UserError(f"{name}{at}: not valid YAML: {_problem(error, text, line)}") from None
    except RecursionError:
        raise UserError(f"{name}: not valid YAML: nested too deeply") from None


def _walk(node: yaml.Node, name: str, numbered: bool, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    """Every key path with its line; refuses repeated keys and keys that are no text."""
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, name, numbered, (*path, index))
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            at = f"{name}:{line}" if numbered else name
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{at}: keys are words, found a {key.id}")
            if key.tag != "tag:yaml.org,2002:str":
                raise UserError(f"{at}: keys are words, found {key.value!r}")
            if key.value in seen:
                twice = dotted((*path, key.value))
                raise UserError(f"{at}: key '{twice}' is given twice (first on line {seen[key.value]})")
            seen[key.value] = line
            below = (*path, key.value)
            yield from _walk(value, name, numbered, below)
            yield below, line  # the key's line, not its value's: later pairs win


def _refused(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _line(error: yaml.YAMLError, text: str) -> int | None:
    if (mark := getattr(error, "problem_mark", None)) is not None:
        return mark.line + 1
    position = getattr(error, "position", None)  # of a character that YAML does not allow
    return None if position is None else text.count("\n", 0, position) + 1


def _problem(error: yaml.YAMLError, text: str, line: int | None) -> str:
    written = text.splitlines()[line - 1] if line and line <= len(text.splitlines()) else ""
    if "\t" in written[: len(written) - len(written.lstrip())]:
        return "the line is indented with a tab; use spaces"
    problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    if problem.startswith("but "):
        problem = f"{getattr(error, 'context', '')} {problem}"
    return " ".join(problem.split()).replace("'<stream end>'", "the end of the text")


def _replace(tree: Any, path: KeyPath, value: Any, override: str) -> Any:
    """A copy of `tree` with the value at `path` replaced."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(tree, list):
        if not isinstance(head, int) or head >= len(tree):
            raise UserError(f"override '{override}': {head!r} is no position in a list of {len(tree)}")
        return [_replace(item, rest, value, override) if i == head else item for i, item in enumerate(tree)]
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"override '{override}': nothing can stand below the single value {tree!r}")
    below = tree or {}
    return below | {str(head): _replace(below.get(str(head)), rest, value, override)}
