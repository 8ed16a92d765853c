"""AdamW with less memory: weights and state in bfloat16, or the state in 8 bits.

Both work on the part of a sharded parameter (DTensor) that this process holds, and give bit by bit what they would give
on the whole parameter. All state is plain tensors (DTensors where the parameter is one), there from the start.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed.tensor as distributed
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim.adamw import adamw

from controlllm.errors import UserError

PIECE = 1 << 22
"""Numbers that are updated, and random bits that are drawn, at a time: bounds the float32 copies."""
BLOCK = 256
"""Numbers with one scale in 8 bits; bitsandbytes' kernels know no other."""
VECTOR = 64
"""A multiple of the numbers that a CPU's vector instructions work on at once."""
SMALLEST_8BIT = 4096
"""Smaller tensors keep their state in 32 bits."""


class LowPrecisionAdamW(torch.optim.Optimizer):
    """What both have in common: the walk over parameters, each with its state and its place among them."""

    def __init__(self, groups: Any, *, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"step": torch.zeros(())} | self._new_state(parameter.detach())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] - no step here evaluates a loss
        parameters = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        for place, (group, parameter) in enumerate(parameters):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            state["step"] += 1
            if _local(parameter).numel():
                self._update(group, parameter, state, place)

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _update(self, group: dict[str, Any], parameter: Tensor, state: dict[str, Tensor], place: int) -> None:
        raise NotImplementedError


class AdamWBf16(LowPrecisionAdamW):
    """Weights and moments in bfloat16 only; a step is torch's AdamW in float32, whose result is then rounded.

    A step is mostly smaller than half the distance between two bfloat16 numbers, and rounding to the nearest would
    lose it. Without kahan a weight is rounded up or down at random, with probabilities that make the mean exact. With
    kahan it is rounded to the nearest, and what that lost is kept in `compensation` for the next step (Kahan 1965;
    both in Zamirai et al. 2020, arXiv 2010.06192); as that has 8 bits, too, it is rounded at random. So is always
    `exp_avg_sq`: to the nearest it could not go down any more from beta2 = 0.997 on. The random bits are a function of
    (seed, step, place of the parameter, place in it): nothing of them has to be saved, and they do not depend on how a
    parameter is sharded.
    """

    def __init__(
        self, groups: Any, *, betas: tuple[float, float], eps: float, kahan: bool, seed: int, piece: int = PIECE
    ):
        self.kahan, self.seed, self.piece = kahan, seed, piece
        super().__init__(groups, betas=betas, eps=eps)

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        names = ("exp_avg", "exp_avg_sq", "compensation") if self.kahan else ("exp_avg", "exp_avg_sq")
        return {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in names}

    def _update(self, group: dict[str, Any], parameter: Tensor, state: dict[str, Tensor], place: int) -> None:
        weights, grads = _local(parameter).view(-1), _local(parameter.grad).reshape(-1)  # type: ignore[arg-type]
        kept = {name: _local(tensor).view(-1) for name, tensor in state.items() if name != "step"}
        number = int(state["step"])
        for piece, here, within in _pieces(_offset(parameter), weights.numel(), self.piece):
            part = {name: tensor[here] for name, tensor in kept.items()}
            weight, mean, square = (t.float() for t in (weights[here], part["exp_avg"], part["exp_avg_sq"]))
            if self.kahan:
                weight += part["compensation"]
            _adamw_step(group, weight, grads[here].float(), mean, square, number)
            size = min(self.piece, parameter.numel() - piece * self.piece)
            bits = _random_bits(size, weights.device, self.seed, number, place, piece)[within]
            part["exp_avg"].copy_(mean)
            part["exp_avg_sq"].copy_(round_stochastic(square, bits >> 16))
            if self.kahan:
                weights[here].copy_(weight)
                part["compensation"].copy_(round_stochastic(weight - weights[here], bits))
            else:
                weights[here].copy_(round_stochastic(weight, bits))


class AdamW8bit(LowPrecisionAdamW):
    """AdamW with moments in 8 bits and a scale for each 256 of them (Dettmers et al. 2022, arXiv 2110.02861).

    The kernels are bitsandbytes', for CPU and GPU. Rows are filled up to whole blocks, so that a block belongs to one
    row: sharding by rows changes no number, and a checkpoint is resharded as the weights are. Small and narrow tensors
    keep 32 bits.
    """

    def __init__(self, groups: Any, *, betas: tuple[float, float], eps: float):
        try:
            from bitsandbytes.functional import create_dynamic_map  # type: ignore[import-not-found]
        except ImportError:
            raise UserError(
                "train.optimizer.name adamw_8bit: bitsandbytes is not installed; pip install 'controlllm[quant]'"
            ) from None
        self._maps = [create_dynamic_map(signed=signed) for signed in (True, False)]
        super().__init__(groups, betas=betas, eps=eps)

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter.ndim < 2 or parameter.numel() < SMALLEST_8BIT or parameter.shape[-1] < BLOCK:
            return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        *rows, width = parameter.shape
        blocks = -(-width // BLOCK)
        state = {}
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = _zeros_beside(parameter, [*rows, blocks * BLOCK], torch.uint8)
            state[f"{name}_scale"] = _zeros_beside(parameter, [*rows, blocks], torch.float32)
        return state

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch casts all state to the parameters' type; the codes survive that
            if "exp_avg_scale" in state:
                state |= {name: state[name].to(torch.uint8) for name in ("exp_avg", "exp_avg_sq")}

    def _update(self, group: dict[str, Any], parameter: Tensor, state: dict[str, Tensor], place: int) -> None:
        weight, grad = _local(parameter), _local(parameter.grad)  # type: ignore[arg-type]
        kept = {name: _local(tensor) for name, tensor in state.items()}
        number = int(state["step"])
        if "exp_avg_scale" not in kept:
            _adamw_step(group, weight, grad, kept["exp_avg"], kept["exp_avg_sq"], number)
            return
        filling = kept["exp_avg"].shape[-1] - weight.shape[-1]
        if not filling:
            self._step_8bit(group, weight, grad, kept, number)
            return
        filled = torch.nn.functional.pad(weight, (0, filling))
        self._step_8bit(group, filled, torch.nn.functional.pad(grad, (0, filling)), kept, number)
        weight.copy_(filled[..., : weight.shape[-1]])

    def _step_8bit(
        self, group: dict[str, Any], weight: Tensor, grad: Tensor, kept: dict[str, Tensor], number: int
    ) -> None:
        """In place; weight and grad are (..., whole blocks), float32."""
        from bitsandbytes.functional import optimizer_update_8bit_blockwise  # type: ignore[import-not-found]

        self._maps = [map.to(weight.device) for map in self._maps]
        update: Any = optimizer_update_8bit_blockwise
        update(
            "adam", grad.contiguous(), weight, kept["exp_avg"], kept["exp_avg_sq"],
            *group["betas"], 0.0, 0.0, group["eps"], number, group["lr"], *self._maps,
            kept["exp_avg_scale"].view(-1), kept["exp_avg_sq_scale"].view(-1), weight_decay=group["weight_decay"],
        )  # fmt: skip


def round_stochastic(values: Tensor, bits: Tensor) -> Tensor:
    """float32 values as bfloat16, up or down by the low 16 of random `bits` (int32), so that the mean is exact.

    A bfloat16 is the upper half of a float32; adding a uniform number to the lower half carries over with just the
    probability that the lower half stands for.
    """
    return ((values.view(torch.int32) + (bits & 0xFFFF)) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def _random_bits(size: int, device: torch.device, *key: int) -> Tensor:
    """int32 with all 32 bits random, a function of `key` (and of the kind of device)."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest())
    generator = torch.Generator(device).manual_seed(seed >> 1)
    return torch.randint(-(2**31), 2**31, (size,), dtype=torch.int32, device=device, generator=generator)


def _adamw_step(
    group: dict[str, Any], weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, number: int
) -> None:
    """Step `number` (from 1) of torch's AdamW, in place, float32.

    The CPU's kernel rounds numbers after the last whole vector differently. Filled up, none depends on a shard's end.
    """
    filled, count = (weight, grad, exp_avg, exp_avg_sq), weight.numel()
    if count % VECTOR:
        filled = tuple(torch.nn.functional.pad(t.reshape(-1), (0, -count % VECTOR)) for t in filled)
    beta1, beta2 = group["betas"]
    adamw(
        [filled[0]], [filled[1]], [filled[2]], [filled[3]], [],
        [torch.full((), float(number - 1), device=weight.device)],
        fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip
    if count % VECTOR:
        for tensor, result in zip((weight, exp_avg, exp_avg_sq), (filled[0], filled[2], filled[3]), strict=True):
            tensor.copy_(result[:count].view_as(tensor))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _zeros_beside(parameter: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Zeros whose rows lie where the parameter's do."""
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distributed.zeros(shape, dtype=dtype, device_mesh=mesh, placements=placements).to(parameter.device)


def _offset(parameter: Tensor) -> int:
    """Where, in the flat parameter, the part of this process begins; parts are whole rows."""
    if not isinstance(parameter, DTensor):
        return 0
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    assert tuple(shape[1:]) == tuple(parameter.shape[1:]), "sharded by something else than rows"
    return offset[0] * math.prod(shape[1:])


def _pieces(first: int, count: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Pieces of `size` that `count` numbers from `first` on touch: number, the part of ours, the part of the piece."""
    for number in range(first // size, -(-(first + count) // size)):
        begin, end = max(first, number * size), min(first + count, (number + 1) * size)
        yield number, slice(begin - first, end - first), slice(begin - number * size, end - number * size)
