"""Checkpoints of torch.distributed.checkpoint: FSDP's sharded ones, the prior implementation's, and ours."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from controlllm.consolidate.pickles import Record, read_pickle, read_torch
from controlllm.consolidate.tensors import Joined, Placed
from controlllm.control.tensor_files import Source, StoredTensor, read_header
from controlllm.errors import UserError

METADATA, SHARDING = ".metadata", "DCP_SHARDING_INFO"
Part = tuple[tuple[int, ...], StoredTensor]
"""Where it begins in the whole tensor, and its numbers."""


def read_dcp(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Source]:
    """The tensors whose names are wanted. UserError where a file is missing, cut off, or may run code."""
    metadata = read_pickle(folder / METADATA)
    try:
        sizes = {
            name: tuple(entry.state["size"])
            for name, entry in metadata.state["state_dict_metadata"].items()
            if type(entry).__name__ == "TensorStorageMetadata" and wanted(name)
        }
        places = [(key.state, info.state) for key, info in metadata.state["storage_data"].items()]
        parts: dict[str, list[Part]] = {}
        for key, info in places:
            if key["fqn"] in sizes:
                begin = tuple(key.get("offset") or (0,) * len(sizes[key["fqn"]]))
                parts.setdefault(key["fqn"], []).append((begin, _stored(folder, key["fqn"], info)))
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder / METADATA}: describes no checkpoint of torch ({error!r}); copy it again") from None
    return {name: joined(folder, name, parts.get(name, []), shape) for name, shape in sizes.items()}


def _stored(folder: Path, name: str, info: Mapping[str, Any]) -> StoredTensor:
    relative, offset, length = info["relative_path"], info["offset"], info["length"]
    file = folder / str(relative)
    if Path(str(relative)).name != relative:
        raise UserError(f"{folder / METADATA}: names the file {relative}, which is not beside it")
    if not file.is_file():
        raise UserError(f"{file}: not found, but {METADATA} names it: half a checkpoint; copy all of it")
    if offset < 0 or offset + length > file.stat().st_size:
        raise UserError(f"{file}: ends before tensor '{name}' does: half a checkpoint; copy it again")
    found = read_torch(file, offset=offset, length=length)
    if not isinstance(found, StoredTensor):
        what = found.args[0] if isinstance(found, Record) and found.args else "no tensor"
        raise UserError(f"{file}: holds {what} for '{name}', which is not read; save the checkpoint anew")
    return found


def is_safetensors_dcp(folder: Path) -> bool:
    """Whether its safetensors files are shards, as ours are."""
    return any(SHARDING in _metadata(file) for file in sorted(folder.glob("*.safetensors"))[:1])


def read_safetensors_dcp(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Source]:
    """The same of shards in safetensors files."""
    parts: dict[str, list[Part]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        offsets = json.loads(_metadata(file).get(SHARDING, "{}"))
        for name, tensor in read_header(file).items():
            if wanted(name):
                begin = tuple(offsets.get(name, {}).get("saved_offsets") or (0,) * len(tensor.shape))
                parts.setdefault(name, []).append((begin, tensor))
    return {name: joined(folder, name, those, _extent(those)) for name, those in parts.items()}


def _metadata(file: Path) -> dict[str, str]:
    read_header(file)  # says what is wrong with it
    with safe_open(file, framework="pt") as handle:
        return handle.metadata() or {}


def _extent(parts: Iterable[Part]) -> tuple[int, ...]:
    ends = [[at + size for at, size in zip(begin, part.shape, strict=True)] for begin, part in parts]
    return tuple(max(dim) for dim in zip(*ends, strict=True))


def joined(folder: Path, name: str, parts: list[Part], shape: tuple[int, ...]) -> Source:
    """The whole tensor. UserError unless the parts are all of it, once."""
    parts = sorted({begin: (begin, part) for begin, part in parts if part.size or not math.prod(shape)}.values())
    if sum(math.prod(part.shape) for _, part in parts) != math.prod(shape):
        raise UserError(f"{folder}: holds only a part of tensor '{name}': half a checkpoint; copy all of it")
    if len({part.dtype for _, part in parts}) != 1:
        raise UserError(f"{folder}: the parts of tensor '{name}' have several dtypes; save the checkpoint anew")
    row, whole_rows = 0, True
    for begin, part in parts:
        whole_rows &= begin[1:] == (0,) * len(begin[1:]) and part.shape[1:] == shape[1:] and begin[:1] in ((row,), ())
        row += part.shape[0] if part.shape else 0
    return Joined(tuple(part for _, part in parts), shape) if whole_rows else Placed(tuple(parts), shape)
