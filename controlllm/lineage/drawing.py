"""The graph as inline SVG: boxes that lead to their details, in colours and inks of the page's style sheet."""

from markupsafe import Markup, escape

from controlllm.lineage.graph import Graph, Node
from controlllm.lineage.layers import layered, needed

WIDTH, HEIGHT, GAP, DROP, EDGE = 190, 58, 18, 40, 10
"""Of a box; between boxes beside and under each other; around the drawing."""
LETTERS = 25
"""That fit into a box."""
STROKES = {"whole": "var(--learned)", "outside": "var(--quiet)", "gone": "var(--undecided)"}
SIGNS = {"whole": "✓", "changed": "✗", "gone": "○", "unknown": "?"}


def drawing_of(graph: Graph) -> Markup:
    """Sources above, the artifact below; an edge's title says what the one is of the other.

    An edge that others already imply is left out.
    """
    graph = graph.folded()
    edges = needed(list(dict.fromkeys((edge.parent, edge.child) for edge in graph.edges)))
    layers, ways = layered(list(graph.nodes), edges)
    middle = _middles(layers, graph)
    width = max((x for x, _ in middle.values()), default=0) + WIDTH / 2 + EDGE
    height = len(layers) * (HEIGHT + DROP) - DROP + 2 * EDGE
    roles = {(edge.parent, edge.child): edge.role for edge in graph.edges}
    lines = [_line([middle[point] for point in way], roles[ends]) for ends, way in ways.items()]
    boxes = [_box(node, *middle[id], is_root=node is graph.root) for id, node in graph.nodes.items()]
    label = f"What {graph.root.title} was made from: {len(graph.nodes)} nodes, {len(edges)} edges"
    head = Markup('<svg role="img" aria-label="{}" viewBox="0 0 {:.0f} {:.0f}" width="{:.0f}">').format(
        label, width, height, width
    )
    return head + Markup("").join([*lines, *boxes]) + Markup("</svg>")


def _middles(layers: list[list[str]], graph: Graph) -> dict[str, tuple[float, float]]:
    """Each layer around the same axis; a point of an edge takes less room than a box."""

    def room(point: str) -> float:
        return WIDTH if point in graph.nodes else GAP

    spans = [sum(map(room, layer)) + GAP * (len(layer) - 1) for layer in layers]
    found = {}
    for number, layer in enumerate(layers):
        x = EDGE + (max(spans) - spans[number]) / 2
        y = EDGE + number * (HEIGHT + DROP) + HEIGHT / 2
        for point in layer:
            found[point] = (x + room(point) / 2, y)
            x += room(point) + GAP
    return found


def _line(points: list[tuple[float, float]], role: str) -> Markup:
    (x, y), rest = points[0], points[1:]
    path = [f"M{x:.0f} {y + HEIGHT / 2:.0f}"]
    at = y + HEIGHT / 2
    for number, (x2, y2) in enumerate(rest):
        end = y2 - HEIGHT / 2
        bend = (end - at) / 2
        path.append(f"C{x:.0f} {at + bend:.0f} {x2:.0f} {end - bend:.0f} {x2:.0f} {end:.0f}")
        x, at = x2, end
        if number < len(rest) - 1:
            at = y2 + HEIGHT / 2
            path.append(f"L{x:.0f} {at:.0f}")
    return Markup('<path d="{}" fill="none" stroke="var(--quiet)" stroke-width="1.3" opacity=".7">').format(
        " ".join(path)
    ) + Markup("<title>{}</title></path>").format(role)


def _box(node: Node, x: float, y: float, *, is_root: bool) -> Markup:
    left, top = x - WIDTH / 2, y - HEIGHT / 2
    stroke = STROKES.get(node.state, "var(--forgot)")
    dash = "5 4" if node.state in ("gone", "unknown") else "none"
    title = f"{SIGNS[node.state]} {node.title}" if node.state in SIGNS else node.title
    lines = [_cut(title), _cut(_second(node)), node.key or node.content]
    rect = Markup(
        '<rect x="{:.0f}" y="{:.0f}" width="{}" height="{}" rx="8" fill="var(--{})" stroke="{}" stroke-width="{}" '
        'stroke-dasharray="{}"/>'
    ).format(left, top, WIDTH, HEIGHT, "soft" if node.is_source else "card", stroke, 2.5 if is_root else 1.5, dash)
    text = Markup("").join(
        Markup('<text x="{:.0f}" y="{:.0f}" font-size="{}" fill="{}" font-weight="{}">{}</text>').format(
            left + 10, top + 19 + 16 * number, 12 if number == 0 else 10.5,
            "currentColor" if number == 0 else "var(--quiet)", 600 if number == 0 else 400, escape(line),
        )
        for number, line in enumerate(lines)
    )  # fmt: skip
    return Markup('<a href="#{}"><title>{}</title>').format(node.id, node.title) + rect + text + Markup("</a>")


def _second(node: Node) -> str:
    """The fact that tells it from others."""
    if node.is_source:
        return node.stage if node.stage != node.title else ""
    return next((f"{name} {value}" for name, value in node.facts.items() if value), "")


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"
