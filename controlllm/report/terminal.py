"""The answer on the terminal, when a run has ended."""

from pathlib import Path

from controlllm.progress import console
from controlllm.report.read import read_json

COLOURS = {"learned": "green", "kept": "green", "forgot": "red"}


def print_summary(folder: Path, report: Path) -> None:
    """The headline; skills before → after with their verdicts, new ones first; then where the report lies."""
    from rich.markup import escape
    from rich.table import Table

    from controlllm.statistics import MEASURES, format_value

    summary = read_json(folder / "summary.json")
    table = Table(title=escape(f"{summary['name']}: {summary['method']}"), title_justify="left", show_edge=False)
    for column in ("", "skill", "before", "after", "verdict"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    tasks = summary["comparison"]["tasks"].values()
    for role in ("new", "old", "drift"):
        for task in (task for task in tasks if task["role"] == role):
            skill = escape(f"{task['title']} ({MEASURES[task['metric']].partition(',')[0]})")
            before, after = (format_value(task[end], task["metric"]) for end in ("before", "after"))
            colour = COLOURS.get(task["verdict"], "yellow")
            table.add_row(role, skill, before, after, f"[{colour}]{escape(task['detail'])}[/]")
    console.print(table)
    console.print(summary["headline"], markup=False)
    console.print(str(report.absolute()), markup=False)
