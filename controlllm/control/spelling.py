"""The two names of a pair's frozen tensor: ours, `layers.3.frozen.mlp.…`, and the base model's, `layers.3.mlp.…`.

A checkpoint may hold either, so that the base's own files can be part of it as they are.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.core_model_loading import WeightRenaming

from controlllm.control.block import ControlBlock

FROZEN = "frozen."
PARTS = (FROZEN, "expanded.", "interpolation.")


def pair_names(model: nn.Module) -> list[str]:
    """Names of the pairs, bottom to top."""
    return [name for name, module in model.named_modules() if isinstance(module, ControlBlock)]


def base_name(name: str, pairs: Iterable[str]) -> str:
    """Of a tensor by our name; other tensors than a pair's frozen ones have one name only."""
    pair = next((pair for pair in pairs if name.startswith(f"{pair}.{FROZEN}")), None)
    return name if pair is None else f"{pair}.{name.removeprefix(f'{pair}.{FROZEN}')}"


def renamings(model: Any) -> list[WeightRenaming]:
    """What transformers needs to find the frozen tensors by the base's names; ours stay as they are."""
    prefix, others = f"{model.base_model_prefix}.", "|".join(map(re.escape, PARTS))
    return [
        WeightRenaming(
            rf"^(?:{re.escape(prefix)})?{re.escape(name.removeprefix(prefix))}\.(?!{others})", f"{name}.{FROZEN}"
        )
        for name in pair_names(model)
    ]
