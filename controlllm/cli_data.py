"""Commands about data: preview, datasets, steps, and what lies in the cache."""

from pathlib import Path
from typing import Annotated, Any

import typer

from controlllm.errors import UserError

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML recipe, such as workflows/recipes/demo.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to it.")]
PANEL = "Before a run"

cache_app = typer.Typer(
    help="See what the cache holds, why a stage would run again, and free room: ls, explain, verify, prune.",
    rich_markup_mode="markdown",
)


def add_commands(app: typer.Typer) -> None:
    app.command("preview", rich_help_panel=PANEL)(preview)
    app.command("datasets", rich_help_panel=PANEL)(datasets)
    app.command("steps", rich_help_panel=PANEL)(steps)
    app.add_typer(cache_app, name="cache", rich_help_panel="Cache")


def preview(
    recipe: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="Packed rows to show.")] = 3,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a page instead.")] = None,
) -> None:
    """Show the first packed rows as the model will see them: what is learned, what is context, where documents end.

    Learned text is green; without colours, as in a file or a pipe, it stands in ⟦ ⟧. Makes only the first shard of each
    dataset, which the run finds again.

    Example: `controlllm preview workflows/recipes/demo.yaml -n 1`

    Next: `controlllm train workflows/recipes/demo.yaml`
    """
    from controlllm.config import load_config
    from controlllm.preflight import check
    from controlllm.preview import preview as make
    from controlllm.preview import print_preview, write_preview

    config = load_config(recipe, *(overrides or []))
    check(config, recipe=recipe, overrides=overrides or [], serving=False)
    if html and (Path(html).is_dir() or not Path(html).absolute().parent.is_dir()):
        wrong = (
            "is a folder; name a file" if Path(html).is_dir() else f"{Path(html).parent} is no folder; make it first"
        )
        raise UserError(f"--html {html}: {wrong}")
    made = make(config, rows=rows)
    if html:
        write_preview(made, Path(html), name=config.name)
        print(html)
    else:
        print_preview(made)


def datasets() -> None:
    """List the datasets that a recipe can name.

    Example: `controlllm datasets`

    Next: name one under `mix.datasets`, or give your own file with `source` and `format`.
    """
    from controlllm.data.catalog import listing

    rows = []
    for entry in listing():
        size = " · ".join(part for part in (f"{entry.rows:,} rows" if entry.rows else "", entry.size or "") if part)
        about = f"{size or 'any number of rows'} · licence: {entry.license}"
        rows.append((entry.name, f"{' '.join(entry.description.split())}\n{entry.source}\n{about}"))
    _table(rows)


def steps() -> None:
    """List the filters and maps that `preprocess` of a dataset can name.

    Example: `controlllm steps`

    Next: `preprocess: [{length: {max_chars: 8000}}]` under a dataset of `mix.datasets`.
    """
    from controlllm.data.steps import steps_listing

    def options(values: dict[str, str]) -> str:
        return "\n".join(f"{name}: {meaning}" for name, meaning in values.items())

    _table([(s.name, f"{' '.join(s.description.split())}\n{options(s.options)}") for s in steps_listing()])


@cache_app.command("ls")
def ls(
    json: Annotated[bool, typer.Option("--json", help="A JSON object per line, each shard by itself.")] = False,
) -> None:
    """List stage outputs and shards, newest first; shards of one folder's files stand in one line.

    Example: `controlllm cache ls`

    Next: `controlllm cache prune --older-than 30d`
    """
    from controlllm.cache import entries, to_json

    found = entries()
    if json:
        for entry in found:
            print(to_json(entry))
        return
    _print_entries(found)
    print(f"{len(found)} entries, {_size(sum(e.bytes for e in found))}")


@cache_app.command("explain")
def explain(
    recipe: Recipe,
    overrides: Overrides = None,
    stage: Annotated[str, typer.Option("--stage", help="Last stage to look at.")] = "report",
    each: Annotated[
        bool, typer.Option("--each", help="Each stage by itself, as if those before it gave what they gave last.")
    ] = False,
) -> None:
    """Say of each stage of a run whether it comes from the cache, and if not, what changed. Nothing is computed.

    Example: `controlllm cache explain workflows/recipes/demo.yaml pack.context_length=512`

    Next: `controlllm finetune workflows/recipes/demo.yaml pack.context_length=512`
    """
    from controlllm.config import load_config
    from controlllm.explain import every_stage
    from controlllm.explain import explain as lines
    from controlllm.pipeline import STAGES

    if stage not in STAGES:
        raise UserError(f"--stage: unknown stage '{stage}'; known: {', '.join(STAGES)}")
    config = load_config(recipe, *(overrides or []))
    for line in [line for _, line in every_stage(config)] if each else lines(config, until=stage):
        print(line)


@cache_app.command("verify")
def verify() -> None:
    """Read everything again and compare it with its hash; exit code 1 when something is damaged.

    Example: `controlllm cache verify`

    Next: remove what it names, and run the stage again.
    """
    from controlllm.cache import entries
    from controlllm.cache import verify as damaged

    found = entries()
    count = 0
    for line in damaged(found):
        count += 1
        print(line)
    if count:
        raise UserError(f"{count} files of the cache are damaged or missing")
    print(f"ok: {len(found)} entries are what was written")


@cache_app.command("prune")
def prune(
    older_than: Annotated[str, typer.Option("--older-than", metavar="30d|12h", help="Age from which on.")] = "30d",
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it they are only listed.")] = False,
) -> None:
    """Free room: outputs and shards that no run's folder and no prepared dataset uses, and what killed runs left over.

    Example: `controlllm cache prune --older-than 7d`

    Next: the same with `--yes`
    """
    from controlllm.cache import parse_days
    from controlllm.cache import prune as old

    found = old(older_than_days=parse_days(older_than), remove=yes)
    _print_entries(found)
    done = "removed" if yes else "would be removed; run again with --yes"
    print(f"{len(found)} entries, {_size(sum(e.bytes for e in found))}: {done}")


def _print_entries(found: list[Any]) -> None:
    from controlllm.cache import grouped, told

    rows = []
    for group in grouped(found):
        name, what = told(group)
        unused = "" if group[0].used else " · unused"
        rows.append((name, f"{_size(sum(e.bytes for e in group))} · {what}{unused}"))
    _table(rows)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _table(rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)
