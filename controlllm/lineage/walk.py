"""From an artifact to its roots: each parent is looked for by stage and key, and compared with what was recorded."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from controlllm.fingerprint import content_of
from controlllm.lineage.facts import facts_of, metrics_of
from controlllm.lineage.graph import Edge, Graph, Node
from controlllm.lineage.target import Target, open_target
from controlllm.output import content_of_files, find_lineage, store_root, unchanged
from controlllm.private import clean
from controlllm.reasons import ledger

Json = dict[str, Any]
OUTSIDE = "a folder from outside"


def trace(target: Path | str, *, places: Sequence[Path] = ()) -> Graph:
    """Of a run's name or folder, a stage's folder, a model, or a report. UserError for anything else.

    places: folders of outputs that may be among its parents, beside the store's.
    """
    found = open_target(Path(target))
    walk = _Walk(found, places)
    walk.begin()
    return Graph(walk.nodes, walk.edges)


def parents_of(lineage: Json, folder: Path) -> dict[str, Path]:
    """Folders of what an output was made from, by role, as far as they are in its store or in ours."""
    stores = (folder.resolve().parent.parent, store_root())
    found = {}
    for role, parent in lineage["parents"].items():
        places = (store / parent["stage"].replace(" ", "-") / parent["key"] for store in stores)
        if place := next((place for place in places if find_lineage(place)), None):
            found[role] = place
    return found


class _Walk:
    def __init__(self, target: Target, places: Sequence[Path]):
        self.target = target
        self.places = {(made["stage"], made["key"]): place for place in places if (made := find_lineage(place))}
        self.nodes: dict[str, Node] = {}
        self.edges: list[Edge] = []
        self.stores = [store_root()]
        self.known: Json = {}  # lineages that outputs carry of what they were made from

    def begin(self) -> None:
        target = self.target
        if target.lineage is not None:
            self._output(target.lineage, target.folder, title=target.title)
            return
        id = _id(target.kind, target.title)
        self.nodes[id] = Node(id, target.kind, target.title, state="outside" if target.kind == "model" else "whole",
                              facts={k: str(v) for k, v in clean(target.facts).items()})  # fmt: skip
        for role, folder in target.parts.items():
            if lineage := find_lineage(folder):
                self._link(id, self._output(lineage, folder), role)
        for role, parent in target.recorded.items():
            self._link(id, self._parent(role, parent), role)

    def _link(self, child: str, parent: str, role: str) -> None:
        edge = Edge(child, parent, role)
        if edge not in self.edges:
            self.edges.append(edge)

    def _parent(self, role: str, recorded: Json) -> str:
        """The id of the node of what a lineage names."""
        stage, key = recorded["stage"], recorded["key"]
        if stage == OUTSIDE:
            return self._add(Node(_id("outside", recorded["content"]), stage, role, content=recorded["content"],
                                  state="outside"))  # fmt: skip
        folders = [store / stage.replace(" ", "-") / key for store in self.stores]
        folders += [self.places[stage, key]] if (stage, key) in self.places else []
        for folder in folders:
            if (lineage := find_lineage(folder)) is not None:
                return self._output(lineage, folder, recorded=recorded["content"], title=_title(stage, role))
        if (lineage := ledger().find(stage, key) or self.known.get(f"{stage}/{key}")) is not None:
            return self._output(lineage, None, recorded=recorded["content"], title=_title(stage, role))
        return self._add(Node(_id(stage, key), stage, _title(stage, role), key, recorded["content"], "unknown"))

    def _output(self, lineage: Json, folder: Path | None, *, recorded: str | None = None, title: str = "") -> str:
        """A node for it, and all that it was made from; one of another content is a node of its own."""
        stage, wanted = lineage["stage"], recorded or lineage["content"]
        id = _id(stage, lineage["key"] if wanted == lineage["content"] else f"{lineage['key']}-{wanted}")
        if id in self.nodes:
            return id
        if folder and (store := folder.resolve().parent.parent) not in self.stores:
            self.stores.insert(0, store)
        self.known |= lineage.get("ancestors", {})
        state, note = _state(lineage, folder, wanted)
        self._add(_node(id, lineage, folder, title or _title(stage, ""), wanted, state, note))
        for role, parent in lineage["parents"].items():
            self._link(id, self._parent(role, parent), role)
        for source in _sources(lineage, folder):
            self._link(id, self._add(source), source.stage)
        return id

    def _add(self, node: Node) -> str:
        self.nodes.setdefault(node.id, node)
        return node.id


def _node(id: str, lineage: Json, folder: Path | None, title: str, content: str, state: str, note: str) -> Node:
    inputs = clean(lineage["inputs"])

    def starting(prefix: str) -> Json:
        return {name.removeprefix(prefix): v for name, v in inputs.items() if name.startswith(prefix) and v}

    own = {n: v for n, v in inputs.items() if not n.startswith(("code ", "version of ", "output of "))}
    stamps = lineage.get("files", {}).values()
    here = folder if state == "whole" else None
    return Node(
        id, lineage["stage"], title, lineage["key"], content, state, note,
        facts=clean(facts_of(lineage, here)), settings=own, code=starting("code "), versions=starting("version of "),
        made_by=clean(lineage.get("made by", {})), metrics=metrics_of(lineage["stage"], here),
        started=lineage["started"], finished=lineage["finished"], seconds=lineage["seconds"],
        why=clean(lineage.get("why", "")), files=len(stamps),
        bytes=sum(stamp["size"] for stamp in stamps), folder=folder,
    )  # fmt: skip


def _state(lineage: Json, folder: Path | None, recorded: str) -> tuple[str, str]:
    """One of STATES, and what is other."""
    if lineage["content"] != recorded:
        return "changed", f"was made again since: its content was {recorded} and is {lineage['content']}"
    if folder is None:
        return "gone", ""
    if content_of_files(lineage["files"]) != lineage["content"]:
        return "changed", "its lineage.json was changed: the files it lists are not those of its content"
    other = [name for name, stamp in lineage["files"].items() if not unchanged(folder / name, stamp)]
    if other:
        verb = "is missing" if not (folder / other[0]).exists() else "was changed"
        more = f", and {len(other) - 1} more" if len(other) > 1 else ""
        return "changed", f"{other[0]} {verb} since it was made{more}"
    return "whole", ""


def _sources(lineage: Json, folder: Path | None) -> Iterator[Node]:
    """What came from outside: the base model as the recipe names it, the data by its manifest."""
    inputs = lineage["inputs"]
    if lineage["stage"] == "ingest model":
        name, revision = str(clean(inputs.get("model.name"))), inputs.get("model.revision")
        stamp = content_of({n: v for n, v in inputs.items() if n.startswith("model.source")})
        facts = {"revision": str(revision)} if revision else {}
        yield Node(_id("base", name), "base model", name, content=stamp, state="outside", facts=facts)
    if lineage["stage"] == "ingest data":
        for input, digest in inputs.items():
            if input.startswith("source."):
                name = input.removeprefix("source.")
                facts = facts_of(lineage, folder, dataset=name)
                id = _id("data", f"{name}-{digest}")
                yield Node(id, "data", name, content=str(digest), state="outside", facts=clean(facts))


def _title(stage: str, role: str) -> str:
    return role if role.startswith(stage) else stage


def _id(*parts: str) -> str:
    text = "-".join(parts)
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text).strip("-") or "artifact"
