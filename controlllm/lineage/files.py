"""The graph as files: a page, PROV-JSON, OpenLineage, plain JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from controlllm.errors import UserError
from controlllm.lineage.graph import Graph
from controlllm.lineage.openlineage import events_of
from controlllm.lineage.page import page_of
from controlllm.lineage.prov import prov_of

KINDS = {"html": page_of, "prov": prov_of, "openlineage": events_of}


def exports(graph: Graph, files: Mapping[str, Path]) -> list[Path]:
    """Write the kinds that are wanted; all are made before the first is written."""
    texts = {file: KINDS[kind](graph) for kind, file in files.items()}
    for file, text in texts.items():
        write_text(file, text)
    return list(texts)


def write_text(file: Path, text: str) -> None:
    """UserError where it cannot be written."""
    try:
        file.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}; name another file") from None


def to_json(graph: Graph) -> str:
    """Nodes and edges as they are, and what is not as recorded."""
    nodes = [{name: v for name, v in asdict(node).items() if name != "folder"} for node in graph.nodes.values()]
    edges = [asdict(edge) for edge in graph.edges]
    return json.dumps({"nodes": nodes, "edges": edges, "problems": graph.problems()}, indent=1)
