"""Two runs side by side: settings that differ, and where their stages began to give something else."""

import json
from collections.abc import Mapping
from typing import Any

import msgpack
from flytekit.remote import FlyteRemote
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from controlllm.changes import differing, flatten
from controlllm.progress import duration
from tasks.remote.facts import Run, Stage, identity_of, run_of


def settings_of(remote: FlyteRemote, name: str) -> dict[str, Any]:
    """A run's inputs by dotted name; the recipe's settings under `config`."""
    found: dict[str, Any] = {}
    literals = remote.client.get_execution_data(identity_of(remote, name)).full_inputs.literals
    for key, literal in literals.items():
        found |= dict(flatten(plain(literal), key))
    return found


def plain(literal: Any) -> Any:
    """A literal as plain data: a message's values, a folder's place, or a number."""
    scalar = literal.scalar
    if scalar is None:
        return literal.to_flyte_idl().SerializeToString(deterministic=True).hex()
    if scalar.binary is not None:
        return msgpack.unpackb(scalar.binary.value, strict_map_key=False)
    if scalar.blob is not None:
        return scalar.blob.uri
    if scalar.union is not None:
        return plain(scalar.union.value)
    return None if scalar.primitive is None else str(scalar.primitive.value)


def print_diff(remote: FlyteRemote, first: str, second: str) -> None:
    """Raises UserError where one of them is not there."""
    runs = run_of(remote, first), run_of(remote, second)
    settings = settings_of(remote, first), settings_of(remote, second)
    parts: list[Any] = [_versions(*runs), _settings(*settings, runs), _stages(*runs)]
    Console(highlight=False, soft_wrap=True).print(Group(*parts))


def _versions(a: Run, b: Run) -> Text:
    same = (a.plan, a.version) == (b.plan, b.version)
    return Text(f"both: {a.plan} {a.version}" if same else f"{a.plan} {a.version} → {b.plan} {b.version}")


def _settings(a: Mapping[str, Any], b: Mapping[str, Any], runs: tuple[Run, Run]) -> Table | Text:
    names = differing(a, b)
    if not names:
        return Text("the same settings")
    table = Table("setting", runs[0].id, runs[1].id, show_edge=False)
    for name in names:
        values = (Text(json.dumps(each[name], default=str) if name in each else "") for each in (a, b))
        table.add_row(Text(name.removeprefix("config.")), *values)
    return table


def _stages(a: Run, b: Run) -> Table:
    table = Table("stage", a.id, b.id, "output", show_edge=False)
    others = {(stage.id, stage.name): stage for stage in b.stages}
    names = dict.fromkeys([*((s.id, s.name) for s in a.stages), *others])
    ours = {(stage.id, stage.name): stage for stage in a.stages}
    for name in names:
        pair = ours.get(name), others.get(name)
        depth = next(stage.depth for stage in pair if stage)
        table.add_row(Text("  " * depth + name[1]), *map(_cell, pair), _compared(*pair))
    return table


def _cell(stage: Stage | None) -> Text:
    if stage is None:
        return Text("–", style="dim")
    took = duration(stage.seconds) if stage.seconds else ""
    return Text(", ".join(filter(None, (stage.state, stage.cache, took))))


def _compared(a: Stage | None, b: Stage | None) -> Text:
    if a is None or b is None or not (a.outputs and b.outputs):
        return Text("")
    return Text("same", style="green") if a.outputs == b.outputs else Text("differs", style="yellow")
