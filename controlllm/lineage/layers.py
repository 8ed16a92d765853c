"""Places for the nodes of a graph without cycles: in layers, so that an edge goes down and crosses few others."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

SWEEPS = 8
Edges = Sequence[tuple[str, str]]


def layered(nodes: Sequence[str], edges: Edges) -> tuple[list[list[str]], dict[tuple[str, str], list[str]]]:
    """Layers from the sources down, and each edge's way through them: its ends and a point in every layer between.

    edges: (from, to). A point between has a name of its own, which stands in its layer as a node does.
    """
    level = _levels(nodes, edges)
    layers: list[list[str]] = [[] for _ in range(max(level.values(), default=0) + 1)]
    for node in nodes:
        layers[level[node]].append(node)
    ways = {}
    for start, end in edges:
        between = [f"{start} > {end} @{n}" for n in range(level[start] + 1, level[end])]
        for number, point in enumerate(between, start=level[start] + 1):
            layers[number].append(point)
        ways[start, end] = [start, *between, end]
    links = [pair for way in ways.values() for pair in pairwise(way)]
    return _ordered(layers, links), ways


def needed(edges: Edges) -> list[tuple[str, str]]:
    """Without those from whose start another way leads to their end."""
    below: dict[str, set[str]] = {}
    for start, end in edges:
        below.setdefault(start, set()).add(end)

    def reached(node: str) -> set[str]:
        found: set[str] = set()
        to_do = [*below.get(node, ())]
        while to_do:
            if (next_one := to_do.pop()) not in found:
                found.add(next_one)
                to_do += below.get(next_one, ())
        return found

    reach = {node: reached(node) for node in below}
    return [(a, b) for a, b in edges if not any(b in reach.get(other, ()) for other in below[a] - {b})]


def _levels(nodes: Sequence[str], edges: Edges) -> dict[str, int]:
    """A node stands one layer under the lowest of those above it, a source right above the highest below it."""
    level = dict.fromkeys(nodes, 0)
    for _ in nodes:
        for start, end in edges:
            level[end] = max(level[end], level[start] + 1)
    above = {end for _, end in edges}
    for node in nodes:
        below = [level[end] for start, end in edges if start == node]
        if node not in above and below:
            level[node] = min(below) - 1
    return level


def _ordered(layers: list[list[str]], links: Edges) -> list[list[str]]:
    """Each layer by the mean place of its neighbours, downwards and upwards in turn; the best order that came up."""
    up: dict[str, list[str]] = {}
    down: dict[str, list[str]] = {}
    for start, end in links:
        up.setdefault(end, []).append(start)
        down.setdefault(start, []).append(end)
    best, fewest = [*layers], _crossings(layers, down)
    for sweep in range(SWEEPS):
        neighbours = down if sweep % 2 else up
        for number in range(len(layers))[:: -1 if sweep % 2 else 1]:
            place = {node: i for layer in layers for i, node in enumerate(layer)}
            layers[number] = sorted(layers[number], key=lambda node: _mean(node, neighbours, place))
        if (crossings := _crossings(layers, down)) < fewest:
            best, fewest = [[*layer] for layer in layers], crossings
    return best


def _mean(node: str, neighbours: Mapping[str, list[str]], place: Mapping[str, int]) -> float:
    near = neighbours.get(node)
    return sum(place[n] for n in near) / len(near) if near else place[node]


def _crossings(layers: Sequence[Sequence[str]], down: Mapping[str, list[str]]) -> int:
    count = 0
    for upper, lower in pairwise(layers):
        place = {node: i for i, node in enumerate(lower)}
        ends = [place[end] for node in upper for end in sorted(down.get(node, []), key=lambda end: place[end])]
        count += sum(1 for i, a in enumerate(ends) for b in ends[i + 1 :] if b < a)
    return count
