"""DeepSpeed's ZeRO checkpoints: float32 masters as slices of flat buffers (stages 1, 2) or of each parameter (3)."""

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from controlllm.consolidate.pickles import Record, read_torch
from controlllm.consolidate.tensors import Joined
from controlllm.control.tensor_files import DTYPES, Source, StoredTensor
from controlllm.errors import UserError

OPTIMIZER, MODEL = "*_optim_states.pt", "*_model_states.pt"


def step_folder(folder: Path) -> Path | None:
    """The folder itself or, of a run's, the one that `latest` names; None where there are no such files."""
    latest = folder / "latest"
    place = folder / latest.read_text().strip() if latest.is_file() and not _states(folder) else folder
    if place != folder and not place.is_dir():
        raise UserError(f"{place}: not found, but {latest} names it; copy it, too, or name a step's folder")
    return place if _states(place) else None


def _states(folder: Path) -> list[Path]:
    return [*folder.glob(OPTIMIZER), *folder.glob(MODEL)]


def read_zero(folder: Path) -> dict[str, Source]:
    """All parameters and buffers. UserError where a process's file is missing or cut off, or one may run code."""
    optimizers = _ranks(folder, OPTIMIZER)
    states = [read_torch(file)["optimizer_state_dict"] for file in optimizers]
    models = [read_torch(file) for file in _ranks(folder, MODEL)]
    try:
        stage, count = _number(states[0]["zero_stage"]), states[0]["partition_count"]
        count = max(map(_number, count)) if isinstance(count, list) else _number(count)
        _require_all(folder, OPTIMIZER, optimizers, count)
        if stage == 3:
            _require_all(folder, MODEL, _ranks(folder, MODEL), count)
        shapes, frozen = models[0]["param_shapes"], models[0].get("frozen_param_shapes") or {}
        shapes = shapes if isinstance(shapes, list) else [shapes]
        found = {name: models[0]["module"][name] for name in models[0].get("buffer_names", [])}
        if stage == 3:
            found |= _of_parameters(folder, shapes, [_flat(state["fp32_flat_groups"]) for state in states])
            for name, shape in frozen.items():
                parts = [_flat([model["frozen_param_fragments"][name]]) for model in models]
                found[name] = _cut(folder, name, [part for one in parts for part in one], 0, shape)
        else:
            groups = [state["single_partition_of_fp32_groups"] for state in states]
            paddings = states[0].get("param_alignment_paddings")
            found |= _of_groups(folder, shapes, groups, paddings)
            found |= {name: models[0]["frozen_param_fragments"][name] for name in frozen}
        shared = models[0].get("shared_params") or {}
        return found | {name: found[other] for name, other in shared.items() if other in found}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{folder}: is no checkpoint of ZeRO that is known here ({error!r})") from None


def _of_groups(folder: Path, shapes: list[Any], groups: list[Any], paddings: Any) -> dict[str, Source]:
    """Stages 1 and 2: the processes' partitions of a group, one after the other, hold its parameters in their order."""
    found: dict[str, Source] = {}
    for number, those in enumerate(shapes):
        flat, at = [_flat([rank[number]])[0] for rank in groups], 0
        for index, (name, shape) in enumerate(those.items()):
            found[name] = _cut(folder, name, flat, at, shape)
            at += math.prod(shape) + (paddings[number][index] if paddings else 0)
    return found


def _of_parameters(folder: Path, shapes: list[Any], ranks: list[list[StoredTensor]]) -> dict[str, Source]:
    """Stage 3: each process has the same number of each parameter's values, the last ones with padding."""
    found: dict[str, Source] = {}
    at = 0
    for name, shape in [item for those in shapes for item in those.items()]:
        own = math.ceil(math.prod(shape) / len(ranks))
        parts = [part for rank in ranks for part in _slices(rank, at, own)]
        found[name] = _cut(folder, name, parts, 0, shape)
        at += own
    return found


def _cut(folder: Path, name: str, flat: list[StoredTensor], start: int, shape: Any) -> Source:
    parts = tuple(_slices(flat, start, math.prod(shape)))
    if sum(math.prod(part.shape) for part in parts) != math.prod(shape):
        raise UserError(f"{folder}: ends before tensor '{name}' does: half a checkpoint; copy all of it")
    return Joined(parts or tuple(_slices(flat, 0, 0)), tuple(shape))


def _slices(flat: Iterable[StoredTensor], start: int, count: int) -> list[StoredTensor]:
    """`count` numbers from `start` on of what lies one after the other."""
    found = []
    for part in flat:
        length = math.prod(part.shape)
        here, there = max(0, start), min(length, start + count)
        if here < there:
            place = part.start + here * DTYPES[part.dtype].itemsize
            found.append(replace(part, shape=(there - here,), start=place))
        start -= length
    return found


def _flat(tensors: Any) -> list[StoredTensor]:
    if odd := [one for one in tensors if not isinstance(one, StoredTensor)]:
        raise TypeError(f"{type(odd[0]).__name__} instead of a tensor")
    return list(tensors)


def _number(value: Any) -> int:
    return int(value.args[0] if isinstance(value, Record) else value)


def _ranks(folder: Path, pattern: str) -> list[Path]:
    """In the order of the processes that wrote them."""
    files = sorted(folder.glob(pattern), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])
    if not files:
        raise UserError(f"{folder}: has no {pattern}: half a checkpoint of DeepSpeed; copy all of it")
    return files


def _require_all(folder: Path, pattern: str, files: list[Path], count: int) -> None:
    if len(files) == count:
        return
    found = {int(match[1]) for file in files if (match := re.search(r"pp_rank_(\d+)_", file.name))}
    missing = next((rank for rank in range(count) if rank not in found), None)
    name = re.sub(r"pp_rank_\d+_", f"pp_rank_{missing}_", files[0].name)
    raise UserError(
        f"{folder / name}: not found, but {count} processes wrote {pattern} and {len(files)} are here: half a "
        "checkpoint; copy all of it"
    )
