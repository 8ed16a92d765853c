"""The graph as OpenLineage run events, two for each stage, a line of JSON each as its file transport has them."""

import json
from collections.abc import Iterator
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from controlllm.lineage.graph import Graph, Node

Json = dict[str, Any]
NAMESPACE = "controlllm"
PRODUCER = "urn:controlllm"
SPEC = "https://openlineage.io/spec"
SCHEMA = f"{SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent"


def events_of(graph: Graph) -> str:
    """What a stage was made from before the stage."""
    ran = [node for node in _in_order(graph) if not node.is_source]
    events = [event for node in ran for event in (_event(graph, node, "START"), _event(graph, node, "COMPLETE"))]
    return "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events)


def _in_order(graph: Graph) -> Iterator[Node]:
    seen: set[str] = set()

    def visit(id: str) -> Iterator[Node]:
        if id not in seen:
            seen.add(id)
            for edge in graph.parents(id):
                yield from visit(edge.parent)
            yield graph.nodes[id]

    yield from visit(graph.root.id)


def _event(graph: Graph, node: Node, kind: str) -> Json:
    ended = kind == "COMPLETE"
    return {
        "eventType": kind,
        "eventTime": node.finished if ended else node.started,
        "producer": PRODUCER,
        "schemaURL": SCHEMA,
        "run": {"runId": str(uuid5(NAMESPACE_URL, f"{PRODUCER}:{node.id}:{node.started}")), "facets": _about(node)},
        "job": {"namespace": NAMESPACE, "name": node.stage, "facets": {"jobType": _job_type()}},
        "inputs": [_input(graph.nodes[edge.parent], edge.role) for edge in graph.parents(node.id)],
        "outputs": [_dataset(node) | {"outputFacets": _size(node)}] if ended else [],
    }


def _about(node: Node) -> Json:
    """Of a run: the engine in OpenLineage's own terms, and what it has no terms for in a facet of ours."""
    version = node.made_by.get("controlllm", "unknown")
    engine = {"version": version, "name": "controlllm", "openlineageAdapterVersion": version}
    stage = {"key": node.key, "why": node.why, "madeBy": node.made_by, "settings": node.settings, "code": node.code}
    stage |= {"versions": node.versions, "metrics": node.metrics, "seeds": node.seeds}
    return {
        "processing_engine": _facet("1-1-1/ProcessingEngineRunFacet", engine),
        "controlllm_stage": {"_producer": PRODUCER, "_schemaURL": f"{PRODUCER}:stage", **stage},
    }


def _job_type() -> Json:
    return _facet("2-0-4/JobTypeJobFacet", {"processingType": "BATCH", "integration": "CONTROLLLM", "jobType": "STAGE"})


def _input(node: Node, role: str) -> Json:
    facet = {"_producer": PRODUCER, "_schemaURL": f"{PRODUCER}:input", "role": role, "state": node.state}
    return _dataset(node) | {"inputFacets": {"controlllm_input": facet}}


def _dataset(node: Node) -> Json:
    """An output is known by its stage and key, its version is its content."""
    version = _facet("1-0-1/DatasetVersionDatasetFacet", {"datasetVersion": node.content or "unknown"})
    return {"namespace": NAMESPACE, "name": f"{node.stage}/{node.key or node.title}", "facets": {"version": version}}


def _size(node: Node) -> Json:
    if not node.files:
        return {}
    statistics = {"size": node.bytes, "fileCount": node.files}
    return {"outputStatistics": _facet("1-0-2/OutputStatisticsOutputDatasetFacet", statistics)}


def _facet(schema: str, values: Json) -> Json:
    place, _, name = schema.partition("/")
    return {"_producer": PRODUCER, "_schemaURL": f"{SPEC}/facets/{place}/{name}.json#/$defs/{name}", **values}
