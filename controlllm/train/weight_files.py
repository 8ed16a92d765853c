"""Where a base model's tensors lie in its files, found before any of them is read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from controlllm.control import spelling
from controlllm.errors import UserError
from controlllm.train.model import misshapen, refuse_incomplete

PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    key: str


class Converted(Exception):
    """The files hold other tensors than the model, which transformers makes from them: they cannot be read by range."""


def find_tensors(plain: Any, base: Path) -> dict[str, Stored]:
    """Of every entry of the plain model's state dict (tied ones once) where it is stored.

    Raises Converted, or UserError with one line that names file and tensor for what is missing, extra or misshapen.
    """
    wanted = plain.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(wanted.items())}  # tied tensors have several names
    in_model = _renaming(plain)
    found: dict[str, list[Stored]] = {}
    extra: dict[str, Path] = {}
    for file in weight_files(base):
        with opened(file) as handle:
            for key in handle.keys():  # noqa: SIM118 - no mapping
                name, converted = in_model(key, wanted)
                if converted:
                    raise Converted(f"{file}: transformers makes other tensors of '{key}' while it loads")
                if name not in wanted:
                    extra[key] = file
                    continue
                shape = handle.get_slice(key).get_shape()
                if tuple(shape) != tuple(wanted[name].shape):
                    raise misshapen(file, key, shape, wanted[name].shape)
                found.setdefault(first[id(wanted[name])], []).append(Stored(file, key))
    missing = {name for name in first.values() if name not in found}
    _refuse(plain, base, missing, extra)
    for places in found.values():
        _refuse_unequal(places)
    return {name: places[0] for name, places in found.items()}


def weight_files(base: Path) -> list[Path]:
    """The safetensors files that transformers would read."""
    single, index = base / "model.safetensors", base / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise UserError(f"{base}: has neither {single.name} nor {index.name}")
    try:
        return [base / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index}: has no weight_map ({error}); copy the model again") from None


def opened(file: Path) -> Any:
    """A safetensors file as a context, of which ranges are read; UserError where it is missing or damaged."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read: {error}; copy the model again") from None


def read_range(handle: Any, key: str, index: tuple[slice, ...]) -> Tensor:
    """The part of a tensor; only its bytes are read."""
    return handle.get_slice(key)[index] if index else handle.get_tensor(key)


def rows_per_piece(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Rows of a tensor that make at most PIECE_BYTES, and at least one."""
    row = dtype.itemsize
    for size in shape[1:]:
        row *= size
    return max(1, PIECE_BYTES // max(row, 1))


def _renaming(plain: Any) -> Callable[[str, dict[str, Any]], tuple[str, bool]]:
    """Transformers' own rules: from a key in a file to the name in the model, and whether the tensor is converted."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = [*spelling.renamings(plain), *get_model_conversion_mapping(plain)]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def in_model(key: str, wanted: dict[str, Any]) -> tuple[str, bool]:
        name, converter = rename_source_key(key, renamings, converters, plain.base_model_prefix, wanted)
        if name not in wanted and key in wanted:
            return key, False
        return name, converter is not None

    return in_model


def _refuse(plain: Any, base: Path, missing: set[str], extra: dict[str, Path]) -> None:
    """UserError for tensors that are missing or too many, but for those that the architecture can do without."""
    odd = SimpleNamespace(missing_keys=missing, unexpected_keys=set(extra))
    plain._adjust_missing_and_unexpected_keys(odd)
    files = weight_files(base)
    place = files[0] if len(files) == 1 else base / "model.safetensors.index.json"
    for key in sorted(odd.unexpected_keys):
        refuse_incomplete(extra[key], missing=set(), extra={key})
    refuse_incomplete(place, missing=odd.missing_keys, extra=set())


def _refuse_unequal(places: list[Stored]) -> None:
    """A tied tensor that is stored under each of its names must be the same under all."""
    one = places[0]
    for other in places[1:]:
        with opened(one.file) as first, opened(other.file) as second:
            shape = first.get_slice(one.key).get_shape()
            step = rows_per_piece(tuple(shape), torch.float32)
            for row in range(0, shape[0], step):
                index = (slice(row, row + step),)
                if not torch.equal(read_range(first, one.key, index), read_range(second, other.key, index)):
                    raise UserError(
                        f"{other.file}: '{other.key}' differs from '{one.key}', but config.json ties them; set "
                        "tie_word_embeddings to false there"
                    )
