"""The graph as W3C PROV-JSON: outputs are entities, stages activities, controlllm at a version the agent."""

import json
from typing import Any

from controlllm.lineage.graph import Graph, Node

Json = dict[str, Any]
NAMESPACE = "urn:controlllm:"
PREFIX = "controlllm"


def prov_of(graph: Graph) -> str:
    """A document of PROV-JSON (W3C member submission of 2013)."""
    document: Json = {"prefix": {PREFIX: NAMESPACE}, "entity": {}, "activity": {}, "agent": {}}
    document |= {"wasGeneratedBy": {}, "used": {}, "wasDerivedFrom": {}, "wasAssociatedWith": {}}
    for node in graph.nodes.values():
        document["entity"][_name(node.id)] = _entity(node)
        if not node.is_source:
            _add_activity(document, graph, node)
        else:
            for number, edge in enumerate(graph.parents(node.id)):
                _relate(document, "wasDerivedFrom", f"{node.id}-from-{number}",
                        {"prov:generatedEntity": _name(node.id), "prov:usedEntity": _name(edge.parent)})  # fmt: skip
    return json.dumps({part: values for part, values in document.items() if values}, indent=1, ensure_ascii=False)


def _add_activity(document: Json, graph: Graph, node: Node) -> None:
    activity, entity = _name(f"run-{node.id}"), _name(node.id)
    document["activity"][activity] = {
        "prov:startTime": node.started,
        "prov:endTime": node.finished,
        "prov:label": node.stage,
        **_own({"why": node.why, **node.made_by}),
        **_own({f"setting.{name}": value for name, value in node.settings.items()}),
        **_own({f"version.{name}": value for name, value in node.versions.items()}),
        **_own({f"code.{name}": value for name, value in node.code.items()}),
    }
    generated = {"prov:entity": entity, "prov:activity": activity, "prov:time": node.finished}
    _relate(document, "wasGeneratedBy", f"{node.id}-made", generated)
    agent = _name(f"controlllm-{node.made_by.get('controlllm', 'of-an-earlier-version')}")
    document["agent"][agent] = {"prov:type": {"$": "prov:SoftwareAgent", "type": "prov:QUALIFIED_NAME"},
                                "prov:label": "controlllm"}  # fmt: skip
    _relate(document, "wasAssociatedWith", f"{node.id}-by", {"prov:activity": activity, "prov:agent": agent})
    for number, edge in enumerate(graph.parents(node.id)):
        used = {"prov:activity": activity, "prov:entity": _name(edge.parent), "prov:role": edge.role}
        _relate(document, "used", f"{node.id}-used-{number}", used)
        derived = {"prov:generatedEntity": entity, "prov:usedEntity": _name(edge.parent), "prov:activity": activity}
        _relate(document, "wasDerivedFrom", f"{node.id}-from-{number}", derived)


def _entity(node: Node) -> Json:
    about = {"key": node.key, "content": node.content, "state": node.state, "note": node.note}
    metrics = {f"metric.{name}": value for name, value in node.metrics.items()}
    facts = {f"fact.{name}": value for name, value in node.facts.items()}
    return {"prov:label": node.title, "prov:type": node.stage} | _own({**about, **facts, **metrics})


def _relate(document: Json, kind: str, id: str, values: Json) -> None:
    document[kind][f"_:{id}"] = values


def _name(id: str) -> str:
    """A qualified name."""
    return f"{PREFIX}:{_local(id)}"


def _local(text: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in text).strip("-.")


def _own(values: Json) -> Json:
    """Attributes of our namespace; what is not plain is JSON in a string, and what is empty is left out."""
    found = {f"{PREFIX}:{_local(name)}": value for name, value in values.items() if value not in (None, "", [], {})}
    return {name: value if isinstance(value, str | bool | int | float) else json.dumps(value)
            for name, value in found.items()}  # fmt: skip
