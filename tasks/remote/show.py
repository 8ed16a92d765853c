"""Runs for the terminal."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from controlllm.progress import duration
from tasks.remote.facts import Run, Stage

STYLES = {
    "succeeded": "green",
    "recovered": "green",
    "running": "cyan",
    "queued": "cyan",
    "failed": "red",
    "timed_out": "red",
    "aborted": "yellow",
}


def print_runs(runs: Sequence[Run]) -> None:
    """A line each, the newest first."""
    table = Table("run", "plan", "state", "began (UTC)", "took", "version", "by", show_edge=False)
    for run in runs:
        cells = (_state(run.state), _time(run), _took(run.seconds), Text(run.version), run.mode)
        table.add_row(Text(run.id), Text(run.plan), *cells)
        if run.error:
            table.add_row("", Text(run.error, style="red"), end_section=False)
    _print(table)


def print_run(run: Run) -> None:
    """Its stages, what was wrong, and where to look."""
    title = Text.assemble(
        (run.id, "bold"), f"  {run.plan} {run.version}  ", _state(run.state), f"  {_took(run.seconds)} {run.mode}"
    )
    table = Table("stage", "state", "cache", "took", "tries", "node", show_edge=False)
    for stage in run.stages:
        name = Text("  " * stage.depth + stage.name)
        tries = str(stage.tries) if stage.tries > 1 else ""
        table.add_row(name, _state(stage.state), stage.cache, _took(stage.seconds), tries, Text(stage.id, style="dim"))
    parts = [title, table]
    if errors := failures(run):
        parts.append(Text("\n".join(errors), style="red"))
    parts.append(Text(run.url))
    parts += [Text(f"deck of {stage.name}: {stage.deck}", style="dim") for stage in run.stages if stage.deck]
    if run.done and run.state != "succeeded":
        parts.append(Text(f"next: controlllm runs rerun {run.id} --recover, once what was wrong is gone", style="dim"))
    if any(stage.name == "approval" and stage.state == "running" for stage in run.stages):
        parts.append(Text(f"waits for an answer: controlllm runs approve {run.id}", style="yellow"))
    _print(Group(*parts))


def failures(run: Run) -> list[str]:
    """The innermost stages that failed, each with its error's first line; the run's own where there is none."""
    failed = [stage for stage in run.stages if stage.error]
    inner = [stage for stage in failed if not any(_inside(other, stage) for other in failed)]
    return [f"{stage.name}: {stage.error}" for stage in inner] or ([run.error] if run.error else [])


def as_json(value: Run | Sequence[Run]) -> str:
    """All facts."""
    plain = asdict(value) if isinstance(value, Run) else [asdict(each) for each in value]
    return json.dumps(plain, indent=1, default=str)


def _inside(stage: Stage, outer: Stage) -> bool:
    return stage.id.startswith(f"{outer.id}-")


def _state(state: str) -> Text:
    return Text(state, style=STYLES.get(state, ""))


def _time(run: Run) -> str:
    return run.created.astimezone(UTC).strftime("%Y-%m-%d %H:%M")


def _took(seconds: float) -> str:
    return duration(seconds) if seconds else ""


def _print(what: object) -> None:
    Console(highlight=False, soft_wrap=True).print(what)
