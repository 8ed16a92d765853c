"""In what two trees of plain data differ, by dotted name; and how a person is told of it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

SHOWN = 4
Inputs = Mapping[str, Any]


def differences(old: Any, new: Any) -> list[str]:
    """Dotted names of the values in which two trees differ."""
    return differing(dict(flatten(old)), dict(flatten(new)))


def differing(a: Inputs, b: Inputs) -> list[str]:
    """Names of the values in which two flat mappings differ."""
    return [name for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]


def nearest(inputs: Inputs, others: Sequence[Inputs]) -> Inputs | None:
    """Of others of the same benchmark task, the one that differs in the fewest values."""
    # Another task is no earlier version of this one.
    same = [other for other in others if other.get("task.name") == inputs.get("task.name")]
    return min(same, key=lambda other: len(differing(inputs, other)), default=None)


def told(old: Inputs, new: Inputs) -> str:
    """`because train.lr (0.001 → 0.002) changed`; empty where nothing differs."""
    names = differing(new, old)
    shown = [_change(name, old, new) for name in names[:SHOWN]]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"because {', '.join(shown)}{more} changed" if names else ""


def _change(name: str, old: Inputs, new: Inputs) -> str:
    if name.startswith(("code ", "output of ")):
        return name
    return f"{name} ({json.dumps(old.get(name))} → {json.dumps(new.get(name))})"


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of a tree under its dotted name."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, BaseModel | Mapping) for item in value):
        for index, item in enumerate(value):
            yield from flatten(item, f"{path}.{index}")
    else:
        yield path, value
