"""The command that measures: a run's base and tuned model by a recipe, or one checkpoint by suites."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from controlllm.errors import UserError

Target = Annotated[str, typer.Argument(metavar="RECIPE|CKPT", help="A recipe; or a model's folder, to measure it.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to a recipe.")]
Suite = Annotated[
    str | None,
    typer.Option("--suite", metavar="A,B", help="Of a CKPT: suites, tasks or probes; --list shows them."),
]
Run = Callable[[str, list[str] | None], None]


def add_commands(app: typer.Typer, run_stage: Run, panel: str) -> None:
    """`run_stage` runs the pipeline up to this stage."""

    def benchmark(
        target: Target = "",
        overrides: Overrides = None,
        suite: Suite = None,
        items: Annotated[
            int | None, typer.Option("--items", min=1, help="Per task (or subtask); all by default.")
        ] = None,
        data: Annotated[str | None, typer.Option("--data", help="A folder with the datasets as org/name.")] = None,
        prompts: Annotated[str | None, typer.Option("--prompts", metavar="instruct|pretrain")] = None,
        backend: Annotated[str | None, typer.Option("--backend", metavar="auto|hf|vllm")] = None,
        processes: Annotated[int | None, typer.Option("--processes", min=1, help="Copies of the model.")] = None,
        batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Items at a time.")] = None,
        dtype: Annotated[str | None, typer.Option("--dtype", metavar="float32|bfloat16|float16")] = None,
        run_code: Annotated[
            bool, typer.Option("--run-code", help="Allow tasks that run the model's programs.")
        ] = False,
        to: Annotated[str | None, typer.Option("--to", metavar="FOLDER", help="Where a CKPT's results go.")] = None,
        listed: Annotated[bool, typer.Option("--list", help="Show what can be measured.")] = False,
    ) -> None:
        """Measure what a model can do: with a recipe before and after training; or any checkpoint by suites of tasks.

        Tasks are cached one by one, and one that fails does not lose the others. Suites read the Hub, its cache, or
        --data; the suite `offline` needs neither.

        Example: `controlllm benchmark workflows/recipes/demo.yaml benchmark.items=20`

        Example: `controlllm benchmark runs/demo/model --suite math,general --items 200`

        Next: `controlllm compare BASE TUNED`
        """
        if listed:
            _print_names()
            return
        own = {"items": items, "data": data, "prompts": prompts, "backend": backend, "processes": processes}
        own |= {"batch_size": batch_size, "dtype": dtype, "run_code": run_code or None}
        _measure(target, overrides, suite, {k: v for k, v in own.items() if v is not None}, to, run_stage)

    app.command("benchmark", rich_help_panel=panel)(benchmark)


def _measure(
    target: str, overrides: list[str] | None, suite: str | None, own: dict[str, Any], to: str | None, run_stage: Run
) -> None:
    from controlllm.benchmark.measured import is_checkpoint, measure

    if not target:
        raise UserError("benchmark: give a recipe, or a checkpoint's folder with --suite (--list shows what there is)")
    if not is_checkpoint(target):
        if Path(target).is_dir():
            raise UserError(f"{target}: has no config.json, so it is no checkpoint; give a Hugging Face folder")
        if suite and not Path(target).is_file():
            raise UserError(f"{target}: no such folder; give that of a checkpoint, a Hugging Face folder")
        if given := [*own, *(["suite"] if suite else []), *(["to"] if to else [])]:
            name = given[0].replace("_", "-")
            raise UserError(f"--{name} is for a checkpoint; with a recipe write benchmark.KEY=VALUE behind it")
        run_stage(target, overrides)
        return
    if overrides:
        raise UserError(f"{overrides[0]}: a checkpoint has no recipe to change; see controlllm benchmark --help")
    if not suite:
        raise UserError(f"{target}: say with --suite what is measured, such as --suite offline (--list shows all)")
    measure(Path(target), _config(suite, own), to=Path(to) if to else None)


def _config(suite: str, own: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from controlllm.benchmark.check import config_mistake
    from controlllm.config import BenchmarkConfig

    names = [name.strip() for name in suite.split(",") if name.strip()]
    try:
        config = BenchmarkConfig.model_validate({"new": [], "old": names} | own)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{option} {first['input']}: {first['msg']}") from None
    if mistake := config_mistake(config):
        key, said = mistake.split(": ", 1)
        option = {"data": "--data", "backend": "--backend"}.get(key.split(".")[1], "--suite")
        raise UserError(f"{option}: {said.replace('set benchmark.run_code to true', 'allow it with --run-code')}")
    return config


def _print_names() -> None:
    from rich.console import Console
    from rich.table import Table

    from controlllm.benchmark.tasks import listed

    table = Table("suite", "task", "what", show_edge=False)
    for row in listed():
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)
