"""Tensors that are made while they are written, in little memory, from ranges of files."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from controlllm.control.tensor_files import DTYPES, Source, StoredTensor

NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 4 * 2**20
"""Numbers at a time."""


@dataclass(frozen=True)
class Held:
    """A small one that is in memory."""

    tensor: Tensor

    @property
    def dtype(self) -> str:
        return NAMES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def size(self) -> int:
        return self.tensor.nbytes

    def blocks(self) -> Iterator[Any]:
        yield as_bytes(self.tensor)


@dataclass(frozen=True)
class Joined:
    """Parts whose numbers, one after the other, are the tensor's."""

    parts: tuple[StoredTensor, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def blocks(self) -> Iterator[Any]:
        for part in self.parts:
            yield from part.blocks()


@dataclass(frozen=True)
class Placed:
    """Parts that lie anywhere in the tensor, by where each begins; put together in memory."""

    parts: tuple[tuple[tuple[int, ...], StoredTensor], ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.parts[0][1].dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def blocks(self) -> Iterator[Any]:
        whole = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        for begin, part in self.parts:
            whole[tuple(slice(at, at + size) for at, size in zip(begin, part.shape, strict=True))] = part.read()
        yield as_bytes(whole)


@dataclass(frozen=True)
class Cast:
    """The same numbers in another dtype, rounded to the nearest where it is narrower."""

    of: Source
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def blocks(self) -> Iterator[Any]:
        for piece in pieces(self.of):
            yield as_bytes(piece.to(DTYPES[self.dtype]))


@dataclass(frozen=True)
class Blended:
    """(1 - alpha)·frozen + alpha·twin in float32."""

    frozen: Source
    twin: Source
    alpha: float
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.frozen.shape

    @property
    def size(self) -> int:
        return math.prod(self.shape) * 4

    def blocks(self) -> Iterator[Any]:
        for frozen, twin in zip(pieces(self.frozen), pieces(self.twin), strict=True):
            yield as_bytes(torch.lerp(frozen.float(), twin.float(), self.alpha))


@dataclass(frozen=True)
class Changed:
    """What a function of the whole tensor gives, of the same dtype and shape; in memory."""

    of: Source
    change: Callable[[Tensor], Tensor]

    @property
    def dtype(self) -> str:
        return self.of.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def size(self) -> int:
        return self.of.size

    def blocks(self) -> Iterator[Any]:
        yield as_bytes(self.change(read(self.of)))


def pieces(source: Source) -> Iterator[Tensor]:
    """(numbers,) with PIECE of them, at last fewer."""
    dtype = DTYPES[source.dtype]
    wanted, kept = PIECE * dtype.itemsize, bytearray()
    for block in source.blocks():
        kept += memoryview(block)
        while len(kept) >= wanted:
            yield torch.frombuffer(kept[:wanted], dtype=dtype)
            del kept[:wanted]
    if kept:
        yield torch.frombuffer(kept, dtype=dtype)


def read(source: Source) -> Tensor:
    """The whole of it, in memory."""
    if not math.prod(source.shape):
        return torch.empty(source.shape, dtype=DTYPES[source.dtype])
    return torch.cat(list(pieces(source))).reshape(source.shape)


def as_bytes(tensor: Tensor) -> Any:
    """What a file holds of it."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def is_number(source: Source) -> bool:
    """Whether it holds floating-point numbers, which a dtype is chosen for."""
    return DTYPES[source.dtype].is_floating_point
