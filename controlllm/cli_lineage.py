"""Commands that show what was made, and from what: lineage, deck."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from controlllm.lineage import Graph

PANEL = "Looking back"
Artifact = Annotated[
    str,
    typer.Argument(metavar="ARTIFACT", help="A run's name or folder, a folder of the store, a model, or a report."),
]


def add_commands(app: typer.Typer) -> None:
    app.command("lineage", rich_help_panel=PANEL)(lineage)
    app.command("deck", rich_help_panel=PANEL)(deck)


def lineage(
    artifact: Artifact,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with the graph.")] = None,
    prov: Annotated[Path | None, typer.Option("--prov", metavar="FILE", help="Write W3C PROV-JSON.")] = None,
    openlineage: Annotated[
        Path | None, typer.Option("--openlineage", metavar="FILE", help="Write OpenLineage run events, one a line.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="A JSON object instead of the tree.")] = False,
) -> None:
    """Show what an artifact was made from, back to its data and base model, and whether that is still what it was.

    Files take no private thing along: no path of this machine, no password, no token.

    Example: `controlllm lineage runs/demo --html lineage.html`

    Next: `controlllm reproduce runs/demo`
    """
    from controlllm.lineage import trace
    from controlllm.lineage.files import exports

    graph = trace(artifact)
    files = {"html": html, "prov": prov, "openlineage": openlineage}
    written = exports(graph, {kind: file for kind, file in files.items() if file is not None})
    if json:
        from controlllm.lineage.files import to_json

        print(to_json(graph))
    elif written:
        print("\n".join(map(str, written)))
    else:
        _print_tree(graph)


def _print_tree(graph: "Graph") -> None:
    from rich.console import Console

    from controlllm.lineage.tree import tree_of

    console = Console(highlight=False)
    console.print(tree_of(graph))
    problems = graph.problems()
    said = f"{len(problems)} of {len(graph.nodes)} are not what was recorded" if problems else "all as recorded"
    console.print(f"{len(graph.nodes)} nodes, {len(graph.edges)} edges: {said}", markup=False)


def deck(
    target: Annotated[str, typer.Argument(metavar="STAGE_FOLDER|RUN", help="A folder of the store, or a run.")],
    stage: Annotated[
        str | None, typer.Option("--stage", help="Of a run: ingest data, prepare, train, ..., gate.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="By default STAGE.html.")] = None,
) -> None:
    """Write the page of a stage's output, as Flyte's console shows it.

    Example: `controlllm deck runs/demo --stage prepare`

    Next: open the page; `controlllm lineage runs/demo --html lineage.html` for what it was made from.
    """
    from controlllm.decks import folder_of
    from controlllm.lineage.files import write_text
    from controlllm.lineage.target import place_of

    made = folder_of(place_of(Path(target)), stage)()
    file = to or Path(f"{(stage or 'deck').replace(' ', '-')}.html")
    write_text(file, made)
    print(file)
