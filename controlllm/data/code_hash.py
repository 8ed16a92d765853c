"""A hash of what a function does: its code and all that it uses of its own package, and the versions of libraries."""

import ast
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from controlllm.errors import UserError
from controlllm.fingerprint import digest, source_hash, version

Place = tuple[str, str | None]
"""A module and a name in it; None is the whole module."""


@dataclass(frozen=True)
class _Module:
    file: Path
    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, Place]


def code_hash(function: Callable[..., Any]) -> str:
    """Moves with the code of the function, of what it uses in its package, and with other packages' versions.

    Comments, docstrings, annotations, layout, decorators and the rest of its file do not count.
    """
    parts: dict[Place, str] = {}
    libraries: set[str] = set()
    pending = [_place(function)]
    while pending:
        place = pending.pop()
        top = place[0].partition(".")[0]
        if top != _place(function)[0].partition(".")[0]:
            libraries |= {top} - sys.stdlib_module_names
        elif place not in parts:
            parts[place] = _code(place)
            pending += _used(place)
    versions = {library: _version(library) for library in libraries}
    ordered = sorted((module, name or "", code) for (module, name), code in parts.items())
    return digest(json.dumps([ordered, versions], sort_keys=True))


def _place(function: Any) -> Place:
    while isinstance(function, functools.partial) or hasattr(function, "__wrapped__"):
        function = function.func if isinstance(function, functools.partial) else function.__wrapped__
    named = function if hasattr(function, "__qualname__") else type(function)
    top = named.__qualname__.partition(".")[0]
    return named.__module__, None if top == "<lambda>" else top


def _code(place: Place) -> str:
    module, name = _module(place[0]), place[1]
    if name is None:
        return source_hash(module.file)
    return "".join(ast.dump(_bare(node)) for node in module.definitions.get(name, []))


def _used(place: Place) -> Iterator[Place]:
    """What a definition names: others of its module, and what the module imports."""
    module, name = _module(place[0]), place[1]
    if name is None:
        return
    if name not in module.definitions:  # something that the module itself has from elsewhere, or a module in a package
        if name in module.imports:
            yield module.imports[name]
        elif module.file.name == "__init__.py" and importlib.util.find_spec(f"{place[0]}.{name}"):
            yield f"{place[0]}.{name}", None
        return
    names = {
        part.id for node in module.definitions[name] for part in ast.walk(_bare(node)) if isinstance(part, ast.Name)
    }
    for used in sorted(names - {name}):
        if used in module.definitions:
            yield place[0], used
        elif used in module.imports:
            yield module.imports[used]


@cache
def _module(name: str) -> _Module:
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        spec = importlib.util.find_spec(name)
        file = spec.origin if spec else None
    if not file or not file.endswith(".py"):
        raise UserError(f"{name}: its source code cannot be read, so that a change in it would not be seen")
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    definitions: dict[str, list[ast.stmt]] = {}
    for node in tree.body:
        for defined in _defined(node):
            definitions.setdefault(defined, []).append(node)
    package = name if Path(file).name == "__init__.py" else name.rpartition(".")[0]
    return _Module(Path(file), definitions, _imports(tree, package))


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [part.id for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)]


def _imports(tree: ast.AST, package: str) -> dict[str, Place]:
    """Name → what it stands for, also of imports within functions."""
    imports: dict[str, Place] = {}
    for part in ast.walk(tree):
        if isinstance(part, ast.Import):
            for alias in part.names:
                imports[alias.asname or alias.name.partition(".")[0]] = (alias.name, None)
        elif isinstance(part, ast.ImportFrom):
            source = importlib.util.resolve_name(f"{'.' * part.level}{part.module or ''}", package)
            for alias in part.names:
                imports[alias.asname or alias.name] = (source, alias.name)
    return imports


class _Bare(ast.NodeTransformer):
    """Code without what does not run in it: docstrings, annotations, decorators."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns, node.decorator_list = None, []
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]  # type: ignore[attr-defined]
        return node


def _bare(node: ast.stmt) -> ast.AST:
    # A copy: the tree itself is kept for the next function.
    return _Bare().visit(ast.parse(ast.unparse(node)).body[0])


def _version(module: str) -> str | None:
    """Of the distribution that a module comes with, which may have another name."""
    return version(module) or next((version(name) for name in _distributions().get(module, [])), None)


@cache
def _distributions() -> dict[str, list[str]]:
    return {module: list(names) for module, names in metadata.packages_distributions().items()}
