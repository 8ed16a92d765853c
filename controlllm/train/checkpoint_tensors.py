"""The tensors of a checkpoint under torch.distributed.checkpoint (DCP): their names, who writes which, and reading them
into any way of sharding.

Each process writes one safetensors file in DCP's form (its HuggingFaceStorageReader reads it): no pickle anywhere.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor, Shard

from controlllm.control.tensor_files import DTYPES
from controlllm.errors import UserError
from controlllm.train.staging import local_part
from controlllm.train.trained import trained_tensors

PIECE_BYTES = 1 << 23
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHECKED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Written(NamedTuple):
    """A file as it was written."""

    size: int
    hash: str
    """xxh3-128."""


Offsets = dict[str, list[int]]
"""Where in the whole tensor the part begins that a process writes, by name."""


@runtime_checkable
class OwnState(Protocol):
    """An optimizer that keeps what is trained, and its state, in a form of its own. All processes call its methods."""

    def tensors(self, model: nn.Module, *, with_optimizer: bool = True) -> dict[str, Tensor]:
        """Copies as `named_tensors` names them; DTensors where a process has a part."""
        ...

    def take(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Put such tensors where they belong."""
        ...


Optimizer = torch.optim.Optimizer | OwnState


def named_tensors(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """`model.<parameter>` of what is trained and, with an optimizer, `optimizer.<parameter>.<key>` of its state."""
    if isinstance(optimizer, OwnState):
        return optimizer.tensors(model)
    named = {f"model.{name}": tensor for name, tensor in trained_tensors(model).items()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                assert isinstance(value, Tensor), f"the optimizer's {key} of {name} is no tensor: {value!r}"
                named.update([_state_tensor(f"optimizer.{name}.{key}", value, parameter)])
    return named


def _state_tensor(name: str, value: Tensor, parameter: Tensor) -> tuple[str, Tensor]:
    """Plain tensors beside a sharded parameter are this shard's own, but for single numbers, which all shards share."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.ndim == 0:
        return name, value
    mesh, placements = parameter.device_mesh, parameter.placements
    if value.shape == parameter.to_local().shape:
        whole = {"shape": parameter.shape, "stride": parameter.stride()}
        return name, DTensor.from_local(value, mesh, placements, run_check=False, **whole)
    index, count = 0, 1  # such as the scales of an 8-bit state: no slice of anything, so only this sharding reads it
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            index, count = index * mesh.size(dim) + mesh.get_local_rank(dim), count * mesh.size(dim)
    return f"{name}.shard-{index}-of-{count}", value


def own_share(tensors: Mapping[str, Tensor], *, rank: int, gather: Callable[[Any], list[Any]]) -> Offsets:
    """Which tensors, or which parts, this process is to write: each part once, the bytes spread over all processes.

    gather: gives every process's value, in the order of ranks; called once.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
    plans, _ = planner.create_global_plan(gather(planner.create_local_plan()))
    return {item.index.fqn: list(item.index.offset or ()) for item in plans[rank].items}


def write_shard(file: Path, tensors: Mapping[str, Tensor], offsets: Offsets) -> Written:
    """Write contiguous CPU tensors, hashing what is written. UserError where one has a value that is not finite."""
    hasher, size = xxhash.xxh3_128(), 0
    with file.open("wb") as stream:
        for piece in _bytes(tensors, offsets):
            hasher.update(piece)
            size += stream.write(piece)
    return Written(size, hasher.hexdigest())


def _bytes(tensors: Mapping[str, Tensor], offsets: Offsets) -> Iterator[Any]:
    """Of a safetensors file; the widest types first, so that all data is aligned."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    places = {name: {"saved_offsets": offsets[name]} for name in tensors}
    header: dict[str, Any] = {
        "__metadata__": {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
    }
    end = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, tensor in ordered:
        _require_finite(name, tensor)
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        yield from (data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES))


def _require_finite(name: str, tensor: Tensor) -> None:
    if tensor.dtype in _CHECKED and tensor.numel():
        low, high = torch.aminmax(tensor)  # NaN goes through; 100 times faster than isfinite, which makes a mask
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise UserError(
                f"tensor '{name}' has values that are not finite, so no checkpoint is written; lower train.lr, or look "
                f"at the data of the last steps: the checkpoint before is still good"
            )


def read_tensors(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read a verified checkpoint into a model (and its optimizer), in place, whatever wrote it and however it is
    sharded now. UserError unless names, shapes and dtypes are equal; without an optimizer only the model's are read.
    """
    reader, metadata = _open(folder)
    if optimizer is not None:
        _make_state(model, optimizer, metadata)
    _read(folder, reader, metadata, named_tensors(model, optimizer))


def read_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """The same into tensors of these names; without any of an optimizer, the optimizer's are passed over."""
    _read(folder, *_open(folder), tensors)


def _open(folder: Path) -> tuple[HuggingFaceStorageReader, Metadata]:
    reader = HuggingFaceStorageReader(str(folder))
    try:
        return reader, reader.read_metadata()
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _other_run(folder, f"its files are no shards of a checkpoint ({error})") from None


def _read(folder: Path, reader: HuggingFaceStorageReader, metadata: Metadata, tensors: dict[str, Tensor]) -> None:
    _require_equal(folder, metadata, tensors, ignore_optimizer=not any(n.startswith("optimizer.") for n in tensors))
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()


def _make_state(model: nn.Module, optimizer: torch.optim.Optimizer, metadata: Metadata) -> None:
    """Let the optimizer make its state by a step that changes nothing, and keep it where the checkpoint has some."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if any(p not in optimizer.state for p in trained.values()):
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    stored = [name.removeprefix("optimizer.") for name in metadata.state_dict_metadata if name.startswith("optimizer.")]
    for name, parameter in trained.items():
        if not any(key.startswith(f"{name}.") for key in stored):
            optimizer.state.pop(parameter, None)


def _require_equal(folder: Path, metadata: Metadata, tensors: dict[str, Tensor], *, ignore_optimizer: bool) -> None:
    stored = {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not (ignore_optimizer and name.startswith("optimizer."))
    }
    if odd := sorted(_kinds(stored) ^ _kinds(tensors)):
        where = "is missing in the checkpoint" if odd[0] in _kinds(tensors) else "is not in this run"
        hint = (
            "; state in 8 bits goes on with the same train.parallel and processes only" if ".shards-" in odd[0] else ""
        )
        raise _other_run(folder, f"tensor '{odd[0]}' {where}{hint}")
    for name, tensor in tensors.items():
        there, here = stored[name], local_part(tensor)
        if there.size != tensor.shape:
            raise _other_run(folder, f"tensor '{name}' has shape {list(there.size)}, expected {list(tensor.shape)}")
        if there.properties.dtype != here.dtype:
            raise _other_run(folder, f"tensor '{name}' is {there.properties.dtype}, expected {here.dtype}")


def _kinds(names: Iterable[str]) -> set[str]:
    """What belongs to one shard alone stands for that of all shards."""
    return {re.sub(r"\.shard-\d+-of-(\d+)$", r".shards-\1", name) for name in names}


def _other_run(folder: Path, why: str) -> UserError:
    return UserError(f"{folder}: is of another run: {why}; choose another train.checkpoint.folder or remove it")
