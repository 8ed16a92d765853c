"""Datasets by name: the built-in ones, those of other packages, and those that a recipe describes itself.

Another package adds its own under the entry point group `controlllm.datasets`, with `@dataset` or `register`.
"""

from dataclasses import dataclass, replace
from functools import cache

from controlllm.config import DatasetConfig
from controlllm.data import builtin
from controlllm.data.dataset import CATALOG, Dataset, assistant, dataset, register, user
from controlllm.data.forms import FORMS, form_names
from controlllm.data.messages import hint
from controlllm.data.plugins import load_plugins
from controlllm.errors import UserError

__all__ = [
    "CATALOG", "Dataset", "Listed", "assistant", "builtin", "dataset", "dataset_names", "find_dataset", "listing",
    "register", "user",
]  # fmt: skip


@dataclass(frozen=True)
class Listed:
    """A line of `controlllm datasets`."""

    name: str
    description: str
    source: str
    rows: int | None
    size: str | None
    license: str


def dataset_names() -> list[str]:
    """Built-in names and those that installed packages add."""
    _load_plugins()
    return sorted(CATALOG, key=str.lower)


def listing() -> list[Listed]:
    """Everything that a recipe can name."""
    found = [CATALOG[name] for name in dataset_names()]
    return [Listed(d.name, d.description, d.source, d.rows, d.size, d.license) for d in found]


def find_dataset(config: DatasetConfig) -> Dataset:
    """The catalog's entry, perhaps from another source, or one made from `source`, `format` and `fields`."""
    where = f"dataset '{config.name}'"
    if config.format is not None:
        if config.source is None:
            raise UserError(f"{where}: format {config.format} needs a source: where the files are")
        form_names(config.format, config.fields, where=f"{where}: fields")
        made = Dataset(config.name, config.source, "from the recipe", "as its source says")
        return replace(made, form=config.format, fields=config.fields)
    known = dataset_names()
    if config.name not in CATALOG:
        if config.source is not None:
            raise UserError(
                f"{where} has a source but no format, and is not in the catalog; formats: {', '.join(FORMS)}"
            )
        raise UserError(f"unknown dataset '{config.name}'{_nearest(config.name, known)}")
    found = CATALOG[config.name]
    if config.fields:
        if found.form is None:
            raise UserError(f"{where}: fields are for formats; this dataset of the catalog reads its rows by itself")
        form_names(found.form, config.fields, where=f"{where}: fields")
    return replace(found, source=config.source or found.source, fields={**found.fields, **config.fields})


def _nearest(name: str, known: list[str]) -> str:
    """The nearest name first, and all the others: the list is short."""
    near = hint(name, [k.lower() for k in known])
    if not near.startswith("; did"):
        return f"; known: {', '.join(known)}"
    meant = next(k for k in known if f"'{k.lower()}'" in near)
    return f"; did you mean '{meant}'? known: {', '.join(known)}"


@cache
def _load_plugins() -> None:
    load_plugins("controlllm.datasets")
