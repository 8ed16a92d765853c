"""Parameters of which a process has a run of elements, as torch's older FSDP deals them out."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


class Piece(NamedTuple):
    """Where a process's part of a parameter belongs: all parts after one another, by rank, are the flat parameter.

    It stands at the parameter, as `parameter.piece`.
    """

    shape: torch.Size
    """Of the whole parameter."""
    sizes: tuple[int, ...]
    """Elements that each process of the group has."""
    group: Any
    """Of processes that share the parameter."""
    device: torch.device
    """On which they exchange tensors."""

    def whole(self, part: Tensor) -> Tensor:
        """Put together from every process's part, of the parameter or of what belongs to it element by element.

        Every process of the group calls this.
        """
        padded = torch.zeros(max(self.sizes), dtype=part.dtype, device=self.device)
        padded[: part.numel()] = part.detach().flatten()
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([found[:size] for found, size in zip(parts, self.sizes, strict=True)]).view(self.shape)

    def part(self, whole: Tensor) -> Tensor:
        """This process's elements, flat."""
        rank = dist.get_rank(self.group)
        return whole.flatten()[sum(self.sizes[:rank]) :][: self.sizes[rank]]


def rows(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """A copy of this process's rows in CPU memory, as FSDP2 would have them; small tensors stay whole everywhere."""
    rank, size = mesh.get_local_rank(), mesh.size()
    if tensor.ndim == 0 or len(tensor) < size:
        return tensor.cpu().clone()
    parts = tensor.chunk(size)
    own = parts[rank] if rank < len(parts) else tensor[:0]
    whole = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(own.cpu().clone(), mesh, [Shard(0)], run_check=False, **whole)
