"""What training changes in a model: as tensors, and as a file of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from controlllm.control.schedule import scheduled_names
from controlllm.errors import UserError
from controlllm.train.pieces import Piece


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """By parameter name; DTensors of a sharded model as such; tied parameters once."""
    moved = set(scheduled_names(model))
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad or name in moved}


def whole_trained_tensors(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The same, gathered from all processes, in CPU memory of those that `keep` them. Every process calls this."""
    found = {}
    for name in trained_tensors(model):
        full = whole(model.get_parameter(name))
        if keep:
            found[ordinary_name(name)] = full.contiguous().cpu()
    return found


def ordinary_name(name: str) -> str:
    """Of a parameter, without the wrappers that torch's older FSDP puts around modules."""
    return name.replace("_fsdp_wrapped_module.", "")


def whole(parameter: Tensor) -> Tensor:
    """Gathered from all processes, in the precision in which it is trained. Every process calls this."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from controlllm.train.zero import master

        return master(parameter)
    if piece := piece_of(parameter):
        return piece.whole(parameter)
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shape(parameter: Tensor) -> torch.Size:
    """Of the whole parameter; ZeRO-3 and torch's older FSDP leave something else in its place."""
    if piece := piece_of(parameter):
        return piece.shape
    return getattr(parameter, "ds_shape", parameter.shape)


def numel(parameter: Tensor) -> int:
    """Of the whole parameter."""
    return shape(parameter).numel()


def piece_of(parameter: Tensor) -> Piece | None:
    """Of a parameter under torch's older FSDP."""
    return getattr(parameter, "piece", None)


def load_trained(file: Path, model: nn.Module) -> None:
    """Copy trained tensors into a model that is not sharded and frozen the same way; names and shapes must agree."""
    try:
        saved = load_file(file)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    require_same_run(file, {name: tensor.shape for name, tensor in saved.items()}, model)
    wanted = trained_tensors(model)
    for name, tensor in saved.items():
        wanted[name].copy_(tensor)


def require_same_run(place: Path, shapes: Mapping[str, Sequence[int]], model: nn.Module) -> None:
    """UserError unless the names and shapes at `place` are those that training changes in `model`."""
    wanted = trained_tensors(model)
    if odd := sorted(shapes.keys() ^ wanted.keys()):
        where = "is missing in the file" if odd[0] in wanted else "is not trained in this model"
        raise UserError(f"{place}: is of another run: tensor '{odd[0]}' {where}")
    for name, shape in shapes.items():
        if tuple(shape) != tuple(wanted[name].shape):
            raise UserError(f"{place}: tensor '{name}' has shape {list(shape)}, expected {list(wanted[name].shape)}")
