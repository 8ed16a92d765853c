"""What the runs that are done say: a table at equal gain in the terminal, results.md and the chart.

python bench/forgetting/show.py [--results FOLDER] [--levels GAIN ...]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from chart import draw
from curves import Cell, Measure, Results
from experiment import HERE, RESULTS, Experiment
from rich.console import Console
from rich.markdown import Markdown

TABLE = HERE / "results.md"
CHART = HERE.parents[1] / "docs" / "forgetting.png"
TITLES: dict[Measure, str] = {
    "kl": "KL from base to model on old text",
    "old": "Loss on old text above the base's",
}


def show(experiment: Experiment, folder: Path, *, levels: Sequence[float] | None = None) -> None:
    """Print the tables, write them as Markdown and draw the chart: beside other results than this folder's."""
    results, own = Results.read(folder), folder.resolve() == RESULTS
    table, chart = (TABLE, CHART) if own else (folder / TABLE.name, folder / CHART.name)
    text = markdown(results, experiment, levels or experiment.levels)
    table.write_text(text, encoding="utf-8")
    draw(results, results.names(experiment.methods), chart)
    Console(width=140).print(Markdown(text))
    print(f"{table}\n{chart}")


def markdown(results: Results, experiment: Experiment, levels: Sequence[float]) -> str:
    """The methods by both measures, then the settings that were tried."""
    methods = results.names(experiment.methods)
    parts = [f"{len(results.runs)} runs; mean ± standard deviation over seeds, the best of all learning rates and "
             "steps of a method at each gain (nats of held-out puzzle loss below the base's)."]  # fmt: skip
    parts += [grid(results, methods, measure, levels) for measure in TITLES]
    parts += never(results, methods, levels)
    if tried := results.names(experiment.tuning):
        first = results.of_seed(experiment.first_seed)
        ranked = sorted(
            {*tried, *results.names(["concat-lerp-mse"])}, key=lambda name: (first.score(name, levels), name)
        )
        parts += [
            "Settings of Control LLM, by the first seed, the best first:",
            grid(results, ranked, "kl", levels),
        ]
    return "\n\n".join(parts) + "\n"


def grid(results: Results, names: Sequence[str], measure: Measure, levels: Sequence[float]) -> str:
    rows = [f"| {TITLES[measure]}, at a gain of | {' | '.join(f'{level:g}' for level in levels)} | seeds |"]
    rows.append("| --- |" + " ---: |" * (len(levels) + 1))
    for name in names:
        cells = [results.cell(name, measure, level) for level in levels]
        rows.append(f"| {name} | {' | '.join(map(written, cells))} | {len(results.seeds(name))} |")
    return "\n".join(rows)


def written(cell: Cell) -> str:
    """`0.012 ± 0.003`, with the share of seeds if not all reach the gain; a dash where none does."""
    if not cell.values:
        return "–"
    spread = f" ± {cell.spread:.3f}" if len(cell.values) > 1 else ""
    share = f" ({len(cell.values)} of {cell.seeds})" if len(cell.values) < cell.seeds else ""
    return f"{cell.mean:.3f}{spread}{share}"


def never(results: Results, names: Sequence[str], levels: Sequence[float]) -> list[str]:
    """A sentence for each gain that some method has with no seed."""
    missing = {level: [n for n in names if not results.cell(n, "kl", level).values] for level in levels}
    return [f"Never reach a gain of {level:g}: {', '.join(found)}." for level, found in missing.items() if found]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs")
    parser.add_argument("--levels", type=float, nargs="+", help="gains in nats, instead of those of experiment.yaml")
    options = parser.parse_args()
    show(Experiment.read(), options.results, levels=options.levels)
