"""smoke.html: what smoke.json says, on a page that needs nothing from elsewhere."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from controlllm.progress import duration

SIGNS = {"passed": "✓", "failed": "✗", "undecided": "?"}


def render(summary: dict[str, Any]) -> str:
    """Text of models is escaped by the template."""
    environment = Environment(
        loader=PackageLoader("controlllm"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "count": "{:,}".format, "gigabytes": _gigabytes}
    return environment.get_template("smoke.html").render(smoke=summary, signs=SIGNS)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
