"""Whether a run's frozen weights can be quantised: packages, ways of sharing and kinds of blocks, without torch."""

import importlib.util
import json
from collections.abc import Iterator

from controlllm.config import RunConfig
from controlllm.model_shape import Shape

PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8_torchao": "torchao", "float8": "torchao"}
TRANSPOSED = ("gpt2", "openai-gpt")
"""Families whose blocks have transformers' Conv1D in the place of linear layers."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def unquantizable(config: RunConfig, shape: Shape | None) -> str | None:
    """`key: why not, and the way out`, or None. What only the loaded model tells is refused when it is loaded."""
    return next(_complaints(config, shape), None) if config.quantization else None


def _complaints(config: RunConfig, shape: Shape | None) -> Iterator[str]:
    assert config.quantization
    kind, parallel = config.quantization.kind, config.train.parallel
    if importlib.util.find_spec(package := PACKAGES[kind]) is None:
        yield f"quantization.kind: {kind} is by {package}, which is not installed; pip install 'controlllm[quant]'"
    if parallel.kind == "fsdp" and parallel.version == 1:
        yield (
            "train.parallel.version: 1 flattens all weights together, and those of quantization are bytes; "
            "use version: 2 with frozen: replicate"
        )
    elif parallel.kind == "fsdp" and parallel.frozen == "shard":
        yield (
            "train.parallel.frozen: shard would cut the blocks of weights that quantization stores together; "
            "set it to replicate"
        )
    if parallel.kind == "deepspeed" and parallel.zero_stage == 3:
        yield (
            "train.parallel.zero_stage: 3 would cut the blocks of weights that quantization stores together; "
            "use zero_stage 2, or leave the section out"
        )
    if shape and (layers := _other_layers(shape)):
        yield (
            f"quantization: stores linear layers in fewer bits, and most weights of this model's blocks are {layers}; "
            "leave the section out"
        )


def _other_layers(shape: Shape) -> str | None:
    """What the blocks consist of, if it is not linear layers; None where the files do not say."""
    file = shape.path / "config.json"
    if not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    values = values.get("text_config", values)
    if (family := values.get("model_type")) in TRANSPOSED:
        return f"{family}'s transposed layers (Conv1D)"
    if any((values.get(name) or 0) > 1 for name in EXPERTS):
        return "experts that lie in one tensor"
    return None
