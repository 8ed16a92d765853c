"""Copies of tensors in CPU memory, which is all that a checkpoint holds training up for."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Staging:
    """Buffers that are made once and used by every copy; pinned where the tensors are a GPU's."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Contiguous copies, of a DTensor its local part; they are overwritten by the next call."""
        sources = {name: local_part(tensor) for name, tensor in tensors.items()}
        self._buffers = {name: self._buffer(name, source) for name, source in sources.items()}
        for name, source in sources.items():
            self._buffers[name].copy_(source, non_blocking=True)
        if any(source.is_cuda for source in sources.values()):
            torch.cuda.synchronize()
        return dict(self._buffers)

    def _buffer(self, name: str, source: Tensor) -> Tensor:
        old = self._buffers.get(name)
        if old is not None and (old.shape, old.dtype) == (source.shape, source.dtype):
            return old
        return torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)


def local_part(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
