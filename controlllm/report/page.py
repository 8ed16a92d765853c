"""The page: facts into the templates. Every text is escaped there; only charts and checked drawings are markup."""

from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from controlllm import statistics
from controlllm.progress import duration
from controlllm.report.forest import TITLES, count_verdicts

SIGNS = {"learned": "▲", "kept": "✓", "forgot": "✗", "undecided": "?", "drifted": "↔", "passed": "✓", "failed": "✗"}


def render(*, run: dict[str, Any], **context: Any) -> str:
    """The whole page as text."""
    environment = Environment(
        loader=PackageLoader("controlllm"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = ("value", "signed", "relative", "range", "p")
    environment.filters |= {name: getattr(statistics, f"format_{name}") for name in formats}
    environment.filters |= {"duration": duration, "count": "{:,}".format, "short": short, "gigabytes": gigabytes}
    environment.filters["percent"] = percent
    tasks = run["comparison"]["tasks"].values()
    return environment.get_template("report.html").render(
        run=run,
        tasks=[task for role in TITLES for task in tasks if task["role"] == role],
        counts=count_verdicts([task["verdict"] for task in tasks]),
        signs=SIGNS,
        measures=statistics.MEASURES,
        recipe=yaml.safe_dump(run["config"], sort_keys=False, allow_unicode=True),
        **context,
    )


def short(value: float) -> str:
    """`35.4 M`, `2.1 × 10¹⁵`."""
    for size, unit in ((1e12, None), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.1f}{unit}" if unit else _power(value)
    return f"{value:,.0f}"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def percent(share: float) -> str:
    """`21 %`, `0.35 %`."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _power(value: float) -> str:
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits} × 10{str(int(exponent)).translate(str.maketrans('0123456789-', '⁰¹²³⁴⁵⁶⁷⁸⁹⁻'))}"
