"""What an artifact was made from, back to its data and its base model: as a tree, a page, PROV and OpenLineage."""

from controlllm.lineage.graph import Edge, Graph, Node
from controlllm.lineage.walk import trace

__all__ = ["Edge", "Graph", "Node", "trace"]
