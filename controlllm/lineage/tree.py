"""The graph in a terminal: from the artifact to its roots."""

from rich.markup import escape
from rich.tree import Tree

from controlllm.lineage.graph import STATES, Graph, Node

SIGNS = {"whole": "[green]✓[/]", "changed": "[red]✗[/]", "gone": "[yellow]○[/]", "unknown": "[red]?[/]"}
SHOWN = 8
"""Facts in a line."""


def tree_of(graph: Graph) -> Tree:
    """What was shown above is named again, without what is below it."""
    graph = graph.folded()
    top = Tree(_line(graph.root, ""), guide_style="dim")
    _grow(top, graph, graph.root.id, {graph.root.id})
    return top


def _grow(branch: Tree, graph: Graph, id: str, seen: set[str]) -> None:
    for edge in graph.parents(id):
        node = graph.nodes[edge.parent]
        if node.id in seen:
            branch.add(f"{_name(node, edge.role)} [dim]{node.key or node.content}, see above[/]")
            continue
        seen.add(node.id)
        _grow(branch.add(_line(node, edge.role)), graph, node.id, seen)


def _line(node: Node, role: str) -> str:
    facts = [f"{name} {value}" for name, value in list(node.facts.items())[:SHOWN]]
    facts += [f"seed of {name.removesuffix('.seed')} {value}" for name, value in node.seeds.items()]
    facts += [f"commit {node.made_by['commit'][:9]}" if "commit" in node.made_by else ""]
    facts += [f"{name} {node.made_by[name]}" for name in ("image", "profile", "execution") if name in node.made_by]
    said = " · ".join(filter(None, facts))
    bad = f"\n[red]{escape(node.note or STATES[node.state])}[/]" if node.state not in ("whole", "outside") else ""
    below = f"\n[dim]{escape(said)}[/]" if said else ""
    key = f" [dim]{node.key or node.content}[/]" if node.key or node.content else ""
    return f"{_name(node, role)}{key}{below}{bad}"


def _name(node: Node, role: str) -> str:
    sign = f"{SIGNS[node.state]} " if node.state in SIGNS else ""
    title = f"{node.stage}: {node.title}" if node.is_source and node.stage not in node.title else node.title
    as_what = f" [dim]as {escape(role)}[/]" if role and role not in (node.stage, node.title) else ""
    return f"{sign}[bold]{escape(title)}[/]{as_what}"
