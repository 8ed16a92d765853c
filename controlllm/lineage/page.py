"""The graph as one page that needs nothing from elsewhere: the drawing, and the details of each node."""

from controlllm.lineage.drawing import drawing_of
from controlllm.lineage.graph import STATES, Graph
from controlllm.private import without_secrets


def page_of(graph: Graph) -> str:
    """Every text is escaped; only the drawing is markup."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("controlllm"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return without_secrets(
        environment.get_template("lineage.html").render(
            graph=graph, drawing=drawing_of(graph), states=STATES, problems=graph.problems()
        )
    )
