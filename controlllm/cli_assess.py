"""What was learned and what was forgotten, from results that exist: compare."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from controlllm.errors import UserError

Results = Annotated[list[str], typer.Argument(metavar="BASE TUNED [MORE...]", help="Results, runs, or checkpoints.")]


def add_commands(app: typer.Typer) -> None:
    app.command("compare", rich_help_panel="Checkpoints")(compare)


def compare(
    results: Results,
    margin: Annotated[
        float, typer.Option("--margin", help="Kept: surely fell by less; points, or % of the base's loss.")
    ] = 2.0,
    items: Annotated[
        str | None, typer.Option("--items", metavar="TASK", help="Show the items of it that flipped.")
    ] = None,
    learned: Annotated[
        list[str] | None, typer.Option("--learned", metavar="STAGE=TASK", help="With MORE: where a task was taught.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the tables, too.")] = None,
) -> None:
    """Say what a model gained and lost against its base, task by task, with intervals and corrected tests.

    Each of BASE and TUNED is a folder with scores.json, a run's folder, or a checkpoint that was measured. With MORE,
    the models of a sequence of stages: TUNED is the first, and the last is compared with BASE; the matrix of tasks and
    stages, backward and forward transfer follow.

    Example: `controlllm compare runs/demo/base-scores runs/demo/model --items puzzles`

    Example: `controlllm compare BASE STAGE1 STAGE2 --learned 1=gsm8k --learned 2=humaneval`

    Next: `controlllm report`, or `benchmark.gate` in a recipe
    """
    if len(results) < 2:
        raise UserError(f"compare: {results[0]} needs another one to compare with; give BASE and TUNED")
    if not 0 < margin < math.inf:
        raise UserError(f"--margin {margin:g}: must be a number above 0, in points or per cent of the base's loss")
    if learned and len(results) < 3:
        raise UserError("--learned is for a sequence of stages: give BASE and two or more models")
    from controlllm.compare import comparison_table, find_scores, flips_table, stages_table, transfer_table
    from controlllm.statistics import compare_scores
    from controlllm.statistics.stages import compare_stages

    folders = [find_scores(Path(each)) for each in results]
    found = compare_scores(folders[0], folders[-1], margin=margin)
    parts: list[Any] = [comparison_table(found, f"{results[0]} → {results[-1]}"), found["overall"]["sentence"]]
    if len(results) > 2:
        where = _learned(learned or [], results)
        stages = compare_stages(folders, learned=where)
        if unknown := [task for task in where if task not in stages["tasks"]]:
            raise UserError(f"--learned: {unknown[0]} has no place in the matrix; {', '.join(stages['tasks'])} have")
        found["stages"] = stages | {"names": results}
        parts += [stages_table(stages, results), transfer_table(stages)]
    if items is not None:
        if items not in found["tasks"]:
            raise UserError(f"--items {items}: not compared; compared are {', '.join(found['tasks'])}")
        parts.append(flips_table(folders[0], folders[-1], items))
    _show(parts)
    _write(found, parts, json_file, html_file)


def _learned(said: list[str], results: list[str]) -> dict[str, int]:
    """{task: stage} of STAGE=TASK, where a stage is a number from 1 on or one of the results as it was given."""
    found = {}
    for each in said:
        stage, equals, task = each.rpartition("=")
        number = int(stage) if stage.isdecimal() else results.index(stage) if stage in results else -1
        if not equals or not 0 <= number < len(results):
            raise UserError(f"--learned {each}: write STAGE=TASK, with a stage from 0 (the base) to {len(results) - 1}")
        found[task] = number
    return found


def _show(parts: list[Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for part in parts:
        console.print(part, markup=False)
        console.print()


def _write(found: dict[str, Any], parts: list[Any], json_file: Path | None, html_file: Path | None) -> None:
    import json

    from controlllm.compare import to_html

    pages = {}
    if json_file is not None:
        pages[json_file] = json.dumps(found, indent=1, allow_nan=False)
    if html_file is not None:
        pages[html_file] = to_html(parts, found["overall"]["sentence"])
    for file, text in pages.items():
        try:
            file.write_text(text, encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error.strerror}") from None
