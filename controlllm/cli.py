"""The command line: one command per stage, each running what comes before it, or finding it in the cache."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import typer

from controlllm import (
    __version__,
    cli_assess,
    cli_benchmark,
    cli_chat,
    cli_checkpoints,
    cli_cluster,
    cli_consolidate,
    cli_data,
    cli_lineage,
    cli_probe,
    cli_runs,
    cli_serve,
    cli_share,
    cli_smoke,
    cli_train,
)
from controlllm.errors import RunError, UserError, one_line
from controlllm.progress import prepare_environment

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML recipe, such as workflows/recipes/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as train.lr=1e-4 or mix.datasets.0.rows=500."),
]

DEBUG_RANK = "CONTROLLLM_DEBUG_RANK"
"""In the environment: the process whose training stops in pdb."""

app = typer.Typer(
    help=(
        "Control LLM: teach a language model something new without losing what it knows.\n\n"
        "Start with the demo, which runs on a laptop's CPU:\n\n"
        "  controlllm finetune workflows/recipes/demo.yaml\n\n"
        "A recipe says what a run does; any key can be changed behind it (train.steps=50). Each command first runs the "
        "stages before its own, or finds their output in the cache: run it again and it goes on where it stopped."
    ),
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="See and check what a recipe says: show, check, schema.", rich_markup_mode="markdown")
app.add_typer(config_app, name="config", rich_help_panel="Before a run")

# stage: (what it does, an example, what comes next)
STAGES = {
    "finetune": ("Run all stages: from the base model to the report.", "", "open runs/<name>/report.html"),
    "ingest": ("Get the base model and the rows of every dataset.", "mix.datasets.0.rows=500", "controlllm prepare"),
    "prepare": ("Tokenise the rows and pack them.", "pack.context_length=512", "controlllm train"),
    "train": ("Train the twins, on from the newest checkpoint if any.", "train.steps=50", "controlllm consolidate"),
    "consolidate": ("Write the tuned model as a Hugging Face folder.", "", "controlllm benchmark"),
    "benchmark": ("Measure the new skill and the old, before and after.", "benchmark.items=20", "controlllm smoke"),
    "smoke": ("Load the tuned model in vLLM and compare its tokens.", "smoke.prompts=2", "controlllm report"),
    "report": ("Write one HTML page with what was learned and what was forgotten.", "", "open runs/<name>/report.html"),
}


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere in the command.")] = False,
) -> None:
    """Both are taken out of the arguments by `main`; they are here to be listed."""


def ingest(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|SOURCE", help="A recipe; or a dataset, to copy it (a name of the catalog, too)."
        ),
    ],
    overrides: Overrides = None,
    to: Annotated[str | None, typer.Option("--to", metavar="FOLDER", help="Where a dataset is copied to.")] = None,
) -> None:
    """Get the base model and list the rows of every dataset; or copy a dataset from anywhere to anywhere.

    Example: `controlllm ingest workflows/recipes/demo.yaml mix.datasets.0.rows=500`

    Example: `controlllm ingest hf://HuggingFaceH4/ultrachat_200k --to hdfs://namenode:9000/data/ultrachat`

    Next: `controlllm prepare`, or `source:` in a recipe, as the copy's last line says.
    """
    if to is None:
        if "://" in recipe:
            raise UserError(f"{recipe} is a dataset: say with --to where it is copied to, or give a recipe")
        _stage_command("ingest")(recipe, overrides)
        return
    if overrides:
        raise UserError(f"{overrides[0]}: a copy takes no settings of a recipe")
    from controlllm.data.catalog import CATALOG, dataset_names
    from controlllm.transfer import transfer

    transfer(CATALOG[recipe].source if recipe in dataset_names() else recipe, to)


def _stage_command(stage: str) -> Callable[..., None]:
    def command(recipe: Recipe, overrides: Overrides = None) -> None:
        config = _checked(recipe, overrides or [])
        from controlllm.pipeline import run

        run(config, until="report" if stage == "finetune" else stage)

    return command


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=0, help="With --debug: the process that stops in pdb; 0 by default.")
    ] = None,
) -> None:
    """Train the twins, on from the newest checkpoint if any; in as many processes as a launcher starts.

    With --debug one process stops in pdb before the first step, and where an error comes up.

    Example: `controlllm train workflows/recipes/demo.yaml train.steps=50`

    Example: `python -m torch.distributed.run --standalone --nproc-per-node 2 -m controlllm.cli train RECIPE`

    Next: `controlllm consolidate`
    """
    if rank is not None:
        if DEBUG_RANK not in os.environ:
            raise UserError(f"--rank {rank} says which process stops in pdb: it needs --debug, too")
        os.environ[DEBUG_RANK] = str(rank)
    _stage_command("train")(recipe, overrides)


for _stage, (_what, _example, _next) in STAGES.items():
    _line = f"controlllm {_stage} workflows/recipes/demo.yaml {_example}".strip()
    _help = f"{_what}\n\nExample: `{_line}`\n\nNext: `{_next}`"
    _own = {"benchmark": cli_benchmark, "consolidate": cli_consolidate, "smoke": cli_smoke}.get(_stage)
    if _own:
        _own.add_commands(app, _stage_command(_stage), "Stages")
        continue
    if _stage in ("ingest", "train"):
        app.command(_stage, rich_help_panel="Stages")(ingest if _stage == "ingest" else train)
        continue
    app.command(_stage, help=_help, short_help=_what, rich_help_panel="Stages")(_stage_command(_stage))
for _module in (
    cli_assess,
    cli_probe,
    cli_checkpoints,
    cli_chat,
    cli_serve,
    cli_share,
    cli_lineage,
    cli_data,
    cli_train,
    cli_cluster,
    cli_runs,
):
    _module.add_commands(app)


@config_app.command("show")
def show(
    recipe: Recipe,
    overrides: Overrides = None,
    deepspeed: Annotated[bool, typer.Option("--deepspeed", help="DeepSpeed's settings instead, as JSON.")] = False,
    processes: Annotated[int, typer.Option("--processes", min=1, help="With --deepspeed: of the whole run.")] = 1,
) -> None:
    """Print the whole config, defaults included, as YAML: itself a recipe.

    Example: `controlllm config show workflows/recipes/demo.yaml train.lr=1e-4 > mine.yaml`

    Next: `controlllm config check mine.yaml`
    """
    from controlllm.config import load_config
    from controlllm.recipe import write

    if deepspeed:
        cli_train.print_deepspeed(load_config(recipe, *(overrides or [])), processes)
        return
    print(write(load_config(recipe, *(overrides or [])).model_dump(mode="json")), end="")


@config_app.command("check")
def check(recipe: Recipe, overrides: Overrides = None) -> None:
    """Look for everything that can be known to be wrong before any work starts.

    Example: `controlllm config check workflows/recipes/demo.yaml control.num_expanded=6`

    Next: `controlllm finetune workflows/recipes/demo.yaml control.num_expanded=6`
    """
    config = _checked(recipe, overrides or [])
    names = ", ".join(dataset.name for dataset in config.mix.datasets)
    length = f"{config.train.steps} steps" if config.train.steps else f"{config.train.tokens} tokens"
    print(f"ok: {config.name}: {config.model.name} learns {names} in {length}")
    from controlllm.model_shape import model_shape

    if model_shape(config.model.name, revision=config.model.revision) is None:
        print(f"not checked: sites, context and memory, because the model is not here yet (controlllm memory {recipe})")


@config_app.command("schema")
def schema(table: Annotated[bool, typer.Option("--table", help="A table to read, instead of JSON.")] = False) -> None:
    """Print every key a recipe can have: JSON schema for an editor, or a table.

    Example: `controlllm config schema --table`

    Next: `controlllm config show workflows/recipes/demo.yaml`
    """
    import json

    from controlllm.config import RunConfig

    tree = RunConfig.model_json_schema()
    if table:
        from controlllm.schema_table import print_table

        print_table(tree)
    else:
        print(json.dumps(tree, indent=2, ensure_ascii=False))


def _checked(recipe: str, overrides: list[str]) -> Any:
    from controlllm.config import load_config

    config = load_config(recipe, *overrides)
    from controlllm.preflight import check as preflight  # after the recipe's own mistakes, which need less

    preflight(config, recipe=recipe, overrides=overrides)
    return config


def main(argv: list[str] | None = None) -> int:
    """Run one command; a mistake is one line on stderr and exit code 1, or 2 if the command itself is wrong."""
    prepare_environment()
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"controlllm {__version__}")
        return 0
    return run_app(app, args, "controlllm")


def run_app(commands: typer.Typer, args: list[str], name: str) -> int:
    """One command of `commands`, which are called `name`; returns the exit code that `main` promises."""
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"] or ["--help"]
    try:
        with _debugging() if debug and args[0] == "train" else nullcontext():
            code = commands(args, prog_name=name, standalone_mode=False)
        _flush()
    except BrokenPipeError:  # the reader of a pipe, such as head, has enough
        return 1
    except Exception as error:  # noqa: BLE001 - the one place that turns any error into a line
        if debug:
            traceback.print_exc()
        message, code = _one_line(error)
        if isinstance(error, RunError) and os.environ.get("RANK", "0") != "0":
            return code
        return _complain(message, code)
    if code == 130:  # typer's answer to Ctrl-C
        return _complain("stopped; the same command goes on from the newest checkpoint", 130)
    return code or 0


@contextmanager
def _debugging() -> Iterator[None]:
    """Training inside stops in pdb, in the first process if no other is named."""
    before = os.environ.get(DEBUG_RANK)
    os.environ[DEBUG_RANK] = before or "0"
    try:
        yield
    finally:
        del os.environ[DEBUG_RANK]
        os.environ |= {} if before is None else {DEBUG_RANK: before}


def _flush() -> None:
    """A full disk behind stdout is told now, and not by the interpreter at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _one_line(error: Exception) -> tuple[str, int]:
    """What to say, and the exit code."""
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "controlllm"
        return f"{getattr(error, 'format_message', error.__str__)().rstrip('.')}; see {command} --help", 2
    return one_line(error), getattr(error, "code", 1)


def _complain(message: str, code: int) -> int:
    """One line, whatever a file name or a value in it holds."""
    line = "".join(c if c.isprintable() else " " for c in message)
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
