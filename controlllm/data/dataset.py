"""What a dataset is, and how one is registered: a function from a row, or one of the common forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from controlllm.data.forms import FORMS, Convert, form_reader
from controlllm.data.messages import hint
from controlllm.errors import UserError

if TYPE_CHECKING:
    from controlllm.data.types import Message

Function = TypeVar("Function", bound=Callable)


@dataclass(frozen=True)
class Dataset:
    """A source and how its rows are read: by `function`, or else as `form` with `fields` (ours → the source's)."""

    name: str
    source: str
    description: str = ""
    license: str = ""
    rows: int | None = None
    size: str | None = None
    """Of the files to load, such as `1.6 GB`."""
    function: Convert | None = None
    form: str | None = None
    fields: dict[str, str] = field(default_factory=dict)

    @cached_property
    def convert(self) -> Convert:
        """From one row to its document, None where the dataset drops it."""
        if self.function is not None:
            return self.function
        assert self.form is not None, f"dataset {self.name} has neither a function nor a form"
        return form_reader(self.form, self.fields, where=f"dataset '{self.name}': fields")


CATALOG: dict[str, Dataset] = {}
"""Built-in datasets, and those of other packages once `catalog.dataset_names` has loaded them."""
_REGISTERED_BY: dict[str, str] = {}


def dataset(
    name: str, *, source: str, license: str, rows: int | None = None, size: str | None = None
) -> Callable[[Function], Function]:
    """Registers a function from a row to messages, text, or None to drop the row; its docstring describes the data."""

    def add(function: Function) -> Function:
        description = " ".join((function.__doc__ or "").split())
        _add(Dataset(name, source, description, license, rows, size, function), function.__module__)
        return function

    return add


def register(
    name: str,
    *,
    source: str,
    form: str,
    license: str,
    description: str = "",
    fields: dict[str, str] | None = None,
    rows: int | None = None,
    size: str | None = None,
    module: str = "",
) -> None:
    """Registers a dataset whose rows have one of the common forms: no code, and the fastest to read."""
    if form not in FORMS:
        raise UserError(f"dataset '{name}': unknown form '{form}'{hint(form, FORMS)}")
    made = Dataset(name, source, description, license, rows, size, None, form, fields or {})
    _ = made.convert  # its field names are known to be right from here on
    _add(made, module or _caller())


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _add(made: Dataset, module: str) -> None:
    if made.name in CATALOG:
        raise UserError(
            f"dataset '{made.name}' is registered twice, by {_REGISTERED_BY[made.name]} and by {module}: rename one"
        )
    CATALOG[made.name], _REGISTERED_BY[made.name] = made, module


def _caller() -> str:
    """The module that called `register`."""
    import sys

    return sys._getframe(2).f_globals.get("__name__", "?")
