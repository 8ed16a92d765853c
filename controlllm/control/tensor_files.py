"""Safetensors files by ranges of bytes, so that a shard of any size is rewritten in little memory.

A file is 8 bytes (the header's length, little-endian), the header (JSON: name → dtype, shape, range of the data), and
the data of all tensors without gaps.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from controlllm.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
COPY_BYTES = 16 * 2**20
LARGEST_HEADER = 100 * 2**20


class Source(Protocol):
    """A tensor that can be written."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> int: ...
    def blocks(self) -> Iterator[Any]:
        """Its bytes, in pieces."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Of its bytes, from the beginning of the file."""
    change: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Applied to what is read; gives the same dtype and shape."""

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> torch.Tensor:
        data = bytearray(self.size)
        with memoryview(data) as view:
            done = 0
            for block in self._stored_blocks():
                view[done : done + len(block)] = block
                done += len(block)
        tensor = torch.frombuffer(data, dtype=DTYPES[self.dtype]).reshape(self.shape)
        return self.change(tensor) if self.change else tensor

    def blocks(self) -> Iterator[Any]:
        """The bytes of what `read` gives; in small pieces where nothing is changed."""
        if self.change:
            yield self.read().flatten().view(torch.uint8).numpy()
        else:
            yield from self._stored_blocks()

    def _stored_blocks(self) -> Iterator[bytes]:
        left = self.size
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            while left:
                block = stream.read(min(COPY_BYTES, left))
                if not block:
                    raise UserError(f"{self.file}: ended while it was read; was it replaced?")
                left -= len(block)
                yield block


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file in the order of their data; UserError where header and file do not fit together."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise _broken(file, f"its header should have {length} bytes, the file has {size}")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise _broken(file, "its header is no JSON") from None
    if not isinstance(header, dict):
        raise _broken(file, "its header is no JSON object")
    header.pop("__metadata__", None)
    tensors = [_stored(file, name, entry, begin=8 + length) for name, entry in header.items()]
    end = 8 + length
    for name, tensor in sorted(tensors, key=lambda item: (item[1].start, item[1].size)):
        if tensor.start != end:
            raise _broken(file, f"the data of {name} should start at byte {end}, the header says {tensor.start}")
        end += tensor.size
    if end != size:
        raise _broken(file, f"its tensors end at byte {end}, the file has {size}")
    return dict(sorted(tensors, key=lambda item: item[1].start))


def _stored(file: Path, name: str, entry: Any, *, begin: int) -> tuple[str, StoredTensor]:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _broken(file, f"the header's entry of {name} is not one of a tensor") from None
    if dtype not in DTYPES:
        raise UserError(
            f"{file}: tensor {name} has dtype {dtype}, which is none of {', '.join(DTYPES)}; convert it first"
        )
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise _broken(file, f"the header's entry of {name} has shape {list(shape)} and range {[start, end]}")
    stored = StoredTensor(file, dtype, shape, begin + start)
    if stored.size != end - start:
        raise _broken(file, f"{name} of shape {list(shape)} in {dtype} takes {stored.size} bytes, not {end - start}")
    return name, stored


def _broken(file: Path, why: str) -> UserError:
    return UserError(f"{file}: no whole safetensors file ({why}); download it again")


def write(file: Path, tensors: Mapping[str, Source]) -> Iterator[int]:
    """Write the tensors under these names, in this order; yields the number of bytes of each step."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.size]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data, which must be aligned
    with file.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for block in tensor.blocks():
                output.write(block)
                yield len(block)
