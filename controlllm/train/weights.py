"""A model larger than a process's memory: built without weights, sharded, then filled with this process's part.

model = empty_model(base, config.model, method)
parallelize(model, ...)                           # fully_shard takes parameters of the meta device
fill(model, base, device=device)
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from controlllm.config import Method, ModelConfig, QuantizationConfig
from controlllm.control.block import ControlBlock
from controlllm.control.expand import OUTPUT_NAMES, decoder_layers, settings_of
from controlllm.control.norm import RelaxedNorm
from controlllm.progress import console
from controlllm.train import attention
from controlllm.train.distributed import World
from controlllm.train.model import prepare, storage_dtype
from controlllm.train.quantize import frozen_linears, make_room
from controlllm.train.weight_files import Converted, Stored, find_tensors, opened, read_range, rows_per_piece


@dataclass(frozen=True)
class Origin:
    """What a tensor of the prepared model starts as."""

    name: str
    """Of the base model's tensor."""
    dtype: torch.dtype
    """The base's values are rounded to it before they are widened."""
    zero: bool = False
    """Of a stacked copy's output projections."""
    width: int = 0
    """Of DoRA's lengths: each is that of so many of the base's values, in a row."""
    columns: bool = False
    """In a column instead."""


@dataclass(frozen=True)
class Sources:
    """Origins by name in the prepared model; all other tensors have their values from the start."""

    origins: dict[str, Origin]
    stored: dict[str, Stored] | None
    """By name in the base; None where the base has to be loaded whole."""
    whole_because: str
    dtype: torch.dtype
    quantization: QuantizationConfig | None
    quantised: dict[str, str]
    """Name of each layer that is quantised → of its weight in the base; copies of that start from what it becomes."""


def empty_model(base: Path, model: ModelConfig, method: Method, *, seed: int = 0) -> Any:
    """What `load_model` gives, but the base's weights and their copies are on the meta device until `fill`.

    Buffers and new parameters (interpolations, adapters) have their values. Raises UserError as load_model, and where
    the files do not hold what config.json describes.
    """
    attention.register()
    dtype = storage_dtype(model, method)
    plain = _plain(base, model, dtype)
    stored, reason = None, ""
    try:
        stored = find_tensors(plain, base)
    except Converted as converted:
        reason = str(converted)
    state = plain.state_dict(keep_vars=True)
    origins = {id(t): Origin(name, t.dtype) for name, t in reversed(state.items())}
    prepared = prepare(plain, method, seed=seed)
    origins |= dict(_copied(prepared, origins))
    origins |= dict(_measured(prepared, origins))
    named = prepared.state_dict(keep_vars=True).items()
    quantised = {}
    if method.quantization:
        quantised = {name: origins[id(layer.weight)].name for name, layer in frozen_linears(prepared).items()}
    prepared.sources = Sources(
        {n: origins[id(t)] for n, t in named if id(t) in origins}, stored, reason, dtype, method.quantization, quantised
    )
    return prepared


def fill(
    model: Any, base: Path, *, device: torch.device | str, cpu_offload: bool = False, world: World | None = None
) -> None:
    """Give every tensor of an `empty_model` its memory on `device` and its values, of a sharded one the own shard's.

    cpu_offload: shards lie in CPU memory. Beside them, one piece of a tensor is in memory at a time. Where transformers
    converts the base's files while loading, each process loads the base whole first; the main process of `world` says
    so. What is quantised is read in full precision, a matrix at a time. UserError where a file is gone or damaged.
    """
    sources: Sources = model.sources
    unknown = [name for name, p in model.named_parameters() if p.is_meta and name not in sources.origins]
    assert not unknown, f"{unknown[0]} has another name than in the empty model"
    layers = make_room(model, sources.quantised, sources.quantization) if sources.quantization else {}
    with torch.no_grad():
        _materialise(model, torch.device(device), torch.device("cpu" if cpu_offload else device))
        targets = [
            (tensor, sources.origins[name])
            for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()
            if name in sources.origins
        ]
        for tensor, origin in targets:
            if origin.zero:
                _local(tensor)[0].zero_()
        copied = [(tensor, origin) for tensor, origin in targets if not origin.zero]
        read = _reader(sources, base, world)
        for tensor, origin in copied:
            if origin.name not in layers:
                _copy(tensor, origin, partial(read, origin.name))
        for name, those in layers.items():
            value = those[0].take(read(name, ()), device, shared_with=those[1:])
            for tensor, origin in copied:
                if origin.name == name:
                    _copy(tensor, replace(origin, dtype=value.dtype), value.__getitem__)
    del model.sources


def _plain(base: Path, model: ModelConfig, dtype: torch.dtype) -> Any:
    """The base's own class with real buffers and parameters on the meta device, tied where they are."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(base)
    with init_empty_weights(include_buffers=False):
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=model.attention)
    plain.tie_weights()
    if (base / "generation_config.json").exists():
        plain.generation_config = GenerationConfig.from_pretrained(base)
    plan = plain._get_dtype_plan(dtype)  # what an architecture keeps in float32
    for name, parameter in plain.named_parameters():
        for pattern, kept in plan.items():
            if re.search(pattern.replace("*", ".*"), name):
                parameter.data = parameter.data.to(kept)
    return plain


def _copied(model: Any, origins: dict[int, Origin]) -> Iterator[tuple[int, Origin]]:
    """Origins of twins and stacked copies, by the tensor's id."""
    settings = settings_of(model)
    layers = decoder_layers(model.base_model) if settings else []
    for index in settings.stacked if settings else []:
        site = layers[index - 1].state_dict(keep_vars=True)
        for name, tensor in layers[index].state_dict(keep_vars=True).items():
            zero = not set(OUTPUT_NAMES).isdisjoint(name.split("."))
            yield id(tensor), replace(origins[id(site[name])], zero=zero)
    for block in model.modules():
        if not isinstance(block, ControlBlock):
            continue
        frozen = block.frozen.state_dict(keep_vars=True)
        relaxed = [name for name, module in block.expanded.named_modules() if isinstance(module, RelaxedNorm)]
        for name, tensor in block.expanded.state_dict(keep_vars=True).items():
            norm = next((norm for norm in relaxed if name.startswith(f"{norm}.norm.")), None)
            name = name if norm is None else norm + name.removeprefix(f"{norm}.norm")
            if name in frozen:  # a learned relaxation is new
                yield id(tensor), origins[id(frozen[name])]


def _measured(model: nn.Module, origins: dict[int, Origin]) -> Iterator[tuple[int, Origin]]:
    """Origins of DoRA's lengths, by the tensor's id."""
    for layer in model.modules():
        for lengths in getattr(layer, "lora_magnitude_vector", {}).values():
            adapted: Any = layer
            origin = origins[id(adapted.get_base_layer().weight)]
            yield id(lengths.weight), replace(origin, width=adapted.in_features, columns=adapted.fan_in_fan_out)


def _materialise(model: nn.Module, device: torch.device, shard_device: torch.device) -> None:
    """Memory for what has none, and the rest on the device; tied parameters stay one."""
    for parameter in model.parameters():
        if parameter.is_meta and not isinstance(parameter, DTensor):
            made = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
            torch.utils.swap_tensors(parameter, made)

    def real(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.to(device)
        return torch.empty_like(tensor, device=shard_device) if tensor.is_meta else tensor.detach()

    model._apply(real)  # of a sharded module it also renews what FSDP knows of its parameters


def _local(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The part of a tensor that this process holds, and where in the whole it begins."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)


def _reader(sources: Sources, base: Path, world: World | None) -> Callable[[str, tuple[slice, ...]], Tensor]:
    """(name in the base, index) → that part of the tensor."""
    if (stored := sources.stored) is None:
        if world is None or world.is_main:
            console.print(f"[yellow]![/] {sources.whole_because}: every process loads the whole base first")
        from transformers import AutoModelForCausalLM

        dtype = torch.float32 if sources.quantization else sources.dtype
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).state_dict()
        return lambda name, index: whole[name][index]

    def read(name: str, index: tuple[slice, ...]) -> Tensor:
        with opened(stored[name].file) as handle:  # anew each time: what was read of a mapped file stays resident
            return read_range(handle, stored[name].key, index)

    return read


def _copy(tensor: Tensor, origin: Origin, read: Callable[[tuple[slice, ...]], Tensor]) -> None:
    """Into the local part, a piece of rows at a time."""
    local, offset = _local(tensor)
    if not local.ndim:
        local.copy_(read(()).to(origin.dtype))
        return
    step = rows_per_piece((*local.shape, max(origin.width, 1)), origin.dtype) if local.numel() else 1
    for row in range(0, local.shape[0] if local.numel() else 0, step):
        piece = local[row : row + step]
        begin = (offset[0] + row, *offset[1:])
        index = tuple(slice(start, start + size) for start, size in zip(begin, piece.shape, strict=True))
        piece.copy_(_values(origin, index, read))


def _values(origin: Origin, index: tuple[slice, ...], read: Callable[[tuple[slice, ...]], Tensor]) -> Tensor:
    if not origin.width:
        return read(index).to(origin.dtype)
    from controlllm.train.dora import row_lengths

    weight = read((slice(None), *index)).T if origin.columns else read(index)
    return row_lengths(weight.to(origin.dtype))
