"""The graph of what an artifact was made from. Nothing in it is private but the folders."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]
STATES = {
    "whole": "is what was recorded",
    "changed": "is not what was recorded",
    "gone": "is not here; its lineage is known",
    "unknown": "is not here, and nothing is known of it",
    "outside": "comes from outside",
}


@dataclass(frozen=True)
class Node:
    """An output of a stage, a run, or what came from outside."""

    id: str
    """Unique in its graph; letters, digits and hyphens."""
    stage: str
    """What made it; `data` and `base model` are from outside, `run` is a run's folder."""
    title: str
    key: str = ""
    """Of the store."""
    content: str = ""
    """As it was recorded."""
    state: str = "whole"
    """One of STATES."""
    note: str = ""
    """What is not as recorded."""
    facts: dict[str, str] = field(default_factory=dict)
    """What matters, for a person."""
    settings: Json = field(default_factory=dict)
    """By dotted name."""
    code: dict[str, str] = field(default_factory=dict)
    """Hash of each source file."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of libraries."""
    made_by: Json = field(default_factory=dict)
    """Commit, image, profile, execution."""
    metrics: dict[str, float] = field(default_factory=dict)
    started: str = ""
    finished: str = ""
    seconds: float = 0.0
    why: str = ""
    """Why it was computed."""
    files: int = 0
    bytes: int = 0
    folder: Path | None = None
    """Where it is on this machine: the one thing that is never shown."""

    @property
    def seeds(self) -> dict[str, Any]:
        """Of what is random in it."""
        return {name: value for name, value in self.settings.items() if name.rpartition(".")[2] == "seed"}

    @property
    def is_source(self) -> bool:
        return not self.started


@dataclass(frozen=True)
class Edge:
    """`child` was made from `parent`, which is its `role`."""

    child: str
    parent: str
    role: str


@dataclass(frozen=True)
class Graph:
    """Nodes by id, an artifact before what it was made from; the first is what was asked for."""

    nodes: dict[str, Node]
    edges: list[Edge]

    @property
    def root(self) -> Node:
        return next(iter(self.nodes.values()))

    def parents(self, id: str) -> list[Edge]:
        return [edge for edge in self.edges if edge.child == id]

    def problems(self) -> list[str]:
        """A line for each node that is not what it was."""
        return [f"{n.title}: {n.note or STATES[n.state]}" for n in self.nodes.values() if n.state not in OK]

    def folded(self) -> "Graph":
        """Without the single tasks of a benchmark, which it sums up; unless one of them was asked for."""
        kept = {id: n for id, n in self.nodes.items() if n.stage != "benchmark task" or id == self.root.id}
        return Graph(kept, [edge for edge in self.edges if edge.child in kept and edge.parent in kept])


OK = ("whole", "outside")
