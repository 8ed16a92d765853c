"""DoRA (Liu et al. 2024): PEFT's layer with the lengths of the weight rows in float32 and without a second matrix.

PEFT multiplies an identity matrix through the adapter, and measures the rows of W + s·B·A in the type of the input.
The squares of the same lengths are sums of small products, with W's part alone in them where B is zero, so that the
start is the base model exactly:

    ‖wᵢ + s·bᵢA‖² = ‖wᵢ‖² + 2s·(W·Aᵀ)ᵢ·bᵢ + s²·bᵢ(A·Aᵀ)bᵢ
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn


class Dora(DoraLinearLayer):
    """The trained lengths `weight` (out,) of one adapted layer."""

    def __init__(self, lengths: Tensor, *, fan_in_fan_out: bool):
        super().__init__(fan_in_fan_out)
        self.weight = nn.Parameter(lengths)

    def forward(
        self, x: Tensor, *, lora_A: Any, lora_B: Any, scaling: float, base_layer: Any,
        base_result: Tensor | None = None, adapter_name: str = "default",
    ) -> Tensor:  # fmt: skip
        """What is added to the base layer's output; base_result is that, or None where `x` was dropped out of."""
        weight = _weight(base_layer, transposed=self.fan_in_fan_out)
        share = self.weight / adapted_lengths(weight, lora_A.weight, lora_B.weight, scaling)
        base = F.linear(x, weight) if base_result is None else base_result
        if base_result is not None and base_layer.bias is not None:
            base = base - base_layer.bias
        low_rank = lora_B(lora_A(x))
        dtype = low_rank.dtype  # of products: 1 is taken off before that rounds
        return (share - 1).to(dtype) * base + (scaling * share).to(dtype) * low_rank


@torch.no_grad()
def base_lengths(layer: Any) -> Tensor:
    """(out,) of the weight in an adapted layer, where training starts."""
    return row_lengths(_weight(layer.get_base_layer(), transposed=layer.fan_in_fan_out))


def row_lengths(weight: Tensor) -> Tensor:
    """(out, in) → (out,) in float32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


@torch.no_grad()
def adapted_lengths(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Lengths of the rows of weight + scaling · up·down: a constant for the gradient (section 4.3 of the paper)."""
    with torch.autocast(weight.device.type, enabled=False):
        down, up = down.float(), up.float()
        cross = (weight.float() @ down.T * up).sum(1)
        square = (up @ (down @ down.T) * up).sum(1)
        return (row_lengths(weight).square() + 2 * scaling * cross + scaling**2 * square).sqrt()


def _weight(base_layer: Any, *, transposed: bool) -> Tensor:
    """(out, in), also of a layer that keeps it in fewer bits."""
    return transpose(dequantize_module_weight(base_layer), transposed)
