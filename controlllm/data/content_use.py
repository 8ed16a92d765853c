"""What a chat template does with the contents of messages, beyond writing them.

A template that only writes contents can be filled in without running it. What it asks about them (`'</think>' in
content`) is recorded while it runs on a stand-in; where a macro, a join or a block turns the stand-in into plain text,
the template's syntax tree is read instead.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from jinja2 import nodes

_CUTS = frozenset(("split", "rsplit", "partition", "rpartition"))
_SEARCHES = _CUTS | {"__contains__", "__eq__", "__ne__", "startswith", "endswith", "removeprefix", "removesuffix"}
_SEARCHES |= {"replace", "find", "rfind", "index", "rindex", "count"}
_STRIPS = frozenset(("strip", "lstrip", "rstrip", "trim"))
_HARMLESS_FILTERS = frozenset(("trim", "string", "default", "d"))
_JOINING = frozenset(("join", "format", "safe", "escape", "e", "indent", "forceescape"))


@dataclass
class ContentUse:
    """Contents for which a template may do something else than for a stand-in."""

    strings: set[str] = field(default_factory=set)
    """Contents with one of these inside."""
    edges: set[str] = field(default_factory=set)
    """Contents that begin or end with one of these characters."""
    unbounded: set[str] = field(default_factory=set)
    """Operations whose outcome cannot be bounded so (length, slices, ...): any content."""

    def note(self, operation: str, arguments: tuple[Any, ...]) -> None:
        """`operation` is a method of str."""
        texts = [a for argument in arguments for a in (argument if isinstance(argument, tuple) else (argument,))]
        texts = [text for text in texts if isinstance(text, str)]
        if operation in _STRIPS:
            self.edges.update(*texts)
        elif operation in _SEARCHES and not any(isinstance(text, StandIn) for text in texts):
            self.strings.update(text for text in texts if text)
            if operation in _CUTS and not texts:
                self.unbounded.add(f"{operation} at white space")
        elif not (operation == "__getitem__" and texts):  # `content.name` of a str is undefined
            self.unbounded.add(operation)


class StandIn(str):
    """A content that notes what is done with it, also when it is stripped, cut or added to."""

    use: ContentUse
    added_to: bool

    @classmethod
    def of(cls, text: str, use: ContentUse, *, added_to: bool = False) -> "StandIn":
        made = cls(text)
        made.use, made.added_to = use, added_to
        return made

    def __add__(self, other: str) -> "StandIn":
        return StandIn.of(str.__add__(self, other), self.use, added_to=True)

    def __radd__(self, other: str) -> "StandIn":
        return StandIn.of(str.__add__(other, self), self.use, added_to=True)

    def __bool__(self) -> bool:  # empty contents are never filled in
        return str.__len__(self) > 0

    def __str__(self) -> str:  # filters such as replace take str(content)
        return self

    def __iter__(self) -> Iterator[str]:
        self.use.unbounded.add("a loop over characters")
        return str.__iter__(self)


def _noted(name: str) -> Callable[..., Any]:
    original = getattr(str, name)

    def method(self: StandIn, *arguments: Any, **named: Any) -> Any:
        if name in _STRIPS and not any(arguments):
            pass  # what is written shows whether it was stripped
        elif self.added_to:
            self.use.unbounded.add(f"{name} of joined text")
        else:
            self.use.note(name, (*arguments, *named.values()))
        return _kept(original(self, *arguments, **named), self)

    return method


def _kept(result: Any, of: StandIn) -> Any:
    if isinstance(result, list | tuple):
        return type(result)(_kept(part, of) for part in result)
    return StandIn.of(result, of.use, added_to=of.added_to) if isinstance(result, str) else result


_OPERATORS = ("contains", "eq", "ne", "lt", "le", "gt", "ge", "getitem", "mod", "rmod", "mul", "rmul")
for _name in [name for name in dir(str) if not name.startswith("_")] + [f"__{name}__" for name in _OPERATORS]:
    setattr(StandIn, _name, _noted(_name))


def _noted_length(self: StandIn) -> int:
    self.use.unbounded.add("length")
    return str.__len__(self)


StandIn.__len__ = _noted_length  # type: ignore[method-assign]


def read_syntax(tree: nodes.Template, use: ContentUse) -> None:
    """Note what is done with contents that macros, joins and blocks have turned into text that notes nothing."""
    names = _Names(tree)
    if next(tree.find_all(nodes.FilterBlock), None):
        use.unbounded.add("a filter block")
    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Getitem)):
        _note_node(node, names, use)


def _note_node(node: nodes.Node, names: "_Names", use: ContentUse) -> None:
    if isinstance(node, nodes.Compare):
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if any(names.lost(side) for side in sides):
            texts = [c.value for side in sides for c in _all(side, nodes.Const) if isinstance(c.value, str)]
            use.note("__contains__", tuple(texts))
            if not any(isinstance(side, nodes.Const | nodes.List | nodes.Tuple) for side in sides):
                use.unbounded.add("a comparison")
    elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and names.lost(node.node.node):
        if all(isinstance(argument, nodes.Const) for argument in node.args):
            use.note(node.node.attr, tuple(a.value for a in node.args if isinstance(a, nodes.Const)))
        else:
            use.unbounded.add(node.node.attr)
    elif isinstance(node, nodes.Filter) and node.node is not None and names.lost(node.node):
        if node.name == "trim" and node.args and isinstance(node.args[0], nodes.Const):
            use.note("trim", (node.args[0].value,))
        elif node.name not in _HARMLESS_FILTERS | _JOINING:
            use.unbounded.add(node.name)
    elif isinstance(node, nodes.Getitem) and names.lost(node.node):
        named = isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)
        called = node.node.node if isinstance(node.node, nodes.Call) else None
        if not named and not (isinstance(called, nodes.Getattr) and called.attr in _CUTS):
            use.unbounded.add("a slice")


class _Names:
    """Which names hold contents at all, and which hold them as text that notes nothing any more."""

    def __init__(self, tree: nodes.Template):
        self.macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        self._content: set[str] = set()
        self._lost: set[str] = set()
        self._messages: set[str] = set()
        size = -1
        while size != (size := len(self._content) + len(self._lost) + len(self._messages)):
            for node in tree.find_all((nodes.Assign, nodes.AssignBlock, nodes.For, nodes.Call)):
                self._spread(node)

    def _spread(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.Assign):
            self._hold(node.target, node.node)
        elif isinstance(node, nodes.AssignBlock):
            if any(self.content(part) for part in node.body):
                self._hold(node.target, None)
        elif isinstance(node, nodes.For):
            if any(
                n.name in ("messages", "loop_messages") or n.name in self._messages for n in _all(node.iter, nodes.Name)
            ):
                self._messages |= {name.name for name in _all(node.target, nodes.Name)}
            self._hold(node.target, node.iter)
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name in self.macros:
            for target, argument in zip(self.macros[node.node.name].args, node.args, strict=False):
                self._hold(target, argument)

    def _hold(self, target: nodes.Node, value: nodes.Node | None) -> None:
        """`value` None: text that notes nothing."""
        names = {name.name for name in _all(target, nodes.Name)}
        names |= {f"{ref.name}.{ref.attr}" for ref in _all(target, nodes.NSRef)}
        if value is None or self.content(value):
            self._content |= names
        if value is None or self.lost(value):
            self._lost |= names

    def content(self, node: nodes.Node) -> bool:
        key = _key(node)
        if key == "content" or (isinstance(node, nodes.Getattr) and _dotted(node) in self._content):
            return True
        if key is not None and isinstance(node.node, nodes.Name) and node.node.name in self._messages:  # type: ignore[attr-defined]
            return False
        if isinstance(node, nodes.Name):
            return node.name in self._content or node.name in self._messages
        return any(self.content(child) for child in node.iter_child_nodes())

    def lost(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Name):
            return node.name in self._lost
        if isinstance(node, nodes.Getattr) and _dotted(node) in self._lost:
            return True
        macro = isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name in self.macros
        method = isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr in _JOINING
        joined = isinstance(node, nodes.Concat) or (isinstance(node, nodes.Filter) and node.name in _JOINING)
        if (macro or method or joined) and any(self.content(child) for child in node.iter_child_nodes()):
            return True
        return any(self.lost(child) for child in node.iter_child_nodes())


def _all(node: nodes.Node, kind: type[Any]) -> list[Any]:
    return ([node] if isinstance(node, kind) else []) + list(node.find_all(kind))


def _key(node: nodes.Node) -> str | None:
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        return node.arg.value
    return None


def _dotted(node: nodes.Getattr) -> str:
    return f"{node.node.name}.{node.attr}" if isinstance(node.node, nodes.Name) else ""
