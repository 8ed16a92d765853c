"""What a page consists of, and how it becomes HTML. Every text is escaped; only figures are markup."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from controlllm.charts import Figure
from controlllm.preview import Shown
from controlllm.private import clean, without_secrets

Json = dict[str, Any]
LONGEST = 1500
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class Tile:
    """A number with its name."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """rows: as many cells as columns; numbers: the columns that stand to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numbers: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A part of a page, with a title and whatever it has of the rest."""

    title: str
    note: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    texts: Sequence[tuple[str, str]] = ()
    """Titles and what stands under them, as it is."""
    documents: Sequence[Shown] = ()
    """Token by token."""


@dataclass(frozen=True)
class Page:
    """A whole page."""

    stage: str
    title: str
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = ()
    headline: str = ""
    verdict: str = ""
    """learned, kept, forgot, undecided, passed or failed: the headline's colour."""
    made: Json = field(default_factory=dict)
    """The lineage."""


def render(page: Page) -> str:
    """HTML that needs nothing from elsewhere."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("controlllm"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = shortened
    made = page.made | {"inputs": clean(page.made.get("inputs", {})), "made by": clean(page.made.get("made by", {}))}
    return without_secrets(
        environment.get_template("deck.html").render(page=page, made=made, why=clean(made.get("why", "")))
    )


def shortened(text: str) -> str:
    """A long text's beginning."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"


def size_of(count: float) -> str:
    """`12 kB`, `3.4 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
