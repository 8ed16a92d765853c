"""Commands that hand a run on to others: card, push, reproduce."""

from pathlib import Path
from typing import Annotated

import typer

from controlllm.errors import UserError

Target = Annotated[str, typer.Argument(metavar="RUN|CKPT", help="A run's folder, such as runs/demo, or a model's.")]
License = Annotated[
    str | None, typer.Option("--license", metavar="ID", help="Such as apache-2.0; the base model's when left out.")
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base-model", metavar="OWNER/NAME", help="The base's id on the Hub, if it came elsewhere."),
]
PANEL = "Sharing"


def add_commands(app: typer.Typer) -> None:
    app.command("card", rich_help_panel=PANEL)(card)
    app.command("push", rich_help_panel=PANEL)(push)
    app.command("reproduce", rich_help_panel=PANEL)(reproduce)


def card(
    target: Target,
    to: Annotated[str | None, typer.Option("--to", metavar="FILE", help="Instead of the terminal.")] = None,
    license: License = None,
    base_model: BaseModel = None,
) -> None:
    """Write the model card: what it is, what it learned and forgot, data, cost, licence, how to load it.

    Example: `controlllm card runs/demo --to README.md`

    Next: `controlllm push runs/demo OWNER/NAME --dry-run`
    """
    from controlllm.card import make_card, write_card

    text = make_card(Path(target), license=license, base_model=base_model)
    if to is None:
        print(text, end="")
    else:
        write_card(text, Path(to))
        print(to)


def push(
    target: Target,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub; made if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Only for those whom its owner lets in.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", metavar="BRANCH", help="Made if missing.")] = None,
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all and show what would be sent.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Although the run's gate failed.")] = False,
    license: License = None,
    base_model: BaseModel = None,
) -> None:
    """Check a model and send it with its card to the Hugging Face Hub, or the hub at HF_ENDPOINT.

    The token is HF_TOKEN or that of `hf auth login`. All files arrive in one commit, or none.

    Example: `controlllm push runs/demo OWNER/NAME --dry-run`

    Next: the page of the repository
    """
    from controlllm.push import pack, send, show

    parcel = pack(Path(target), repo, license=license, base_model=base_model, anyway=anyway)
    if dry_run:
        print(f"{show(parcel)}\n\nnothing was sent")
    else:
        print(send(parcel, private=private, revision=revision, message=message))


def reproduce(
    target: Annotated[
        str, typer.Argument(metavar="RUN", help="A run's folder, its summary.json, or a reproduce folder.")
    ],
    run: Annotated[bool, typer.Option("--run", help="Run it in a store of its own and compare the numbers.")] = False,
    to: Annotated[str | None, typer.Option("--to", metavar="FOLDER", help="By default reproduce/ in the run.")] = None,
) -> None:
    """Write the recipe and commands of a run, and say which of its inputs are other on this machine.

    Example: `controlllm reproduce runs/demo`

    Next: `controlllm reproduce runs/demo --run`
    """
    from controlllm.reproduce import reproduce as write
    from controlllm.reproduce import run_again

    folder, inputs = write(Path(target), Path(to) if to else None)
    _print_table(inputs)
    print(folder)
    other = [found for found in inputs if not found.same]
    if not run:
        if other:
            raise UserError(f"{len(other)} of {len(inputs)} inputs differ here: {'; '.join(i.said for i in other)}")
        return
    lines = run_again(folder)
    print("\n".join(lines))
    if differing := sum(line.startswith("differs") for line in lines):
        raise UserError(f"{differing} of {len(lines)} numbers did not come out again: {lines[0]}")


def _print_table(inputs: list) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_edge=False)
    for column in ("input", "recorded", "here"):
        table.add_column(column, overflow="fold")
    for found in inputs:
        here = "[green]same[/]" if found.same else f"[red]differs:[/] {escape(found.here)}"
        table.add_row(escape(found.name), escape(found.recorded), here)
    Console(soft_wrap=False).print(table)
