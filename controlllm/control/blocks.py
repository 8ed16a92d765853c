"""Fine-tuning of some of the model's own blocks: which ones."""

from controlllm.config import PartialConfig


def choose_blocks(config: PartialConfig, num_layers: int) -> list[int]:
    """Layer indices of the blocks that are trained; ValueError names what fits."""
    count = config.num_blocks
    if count > num_layers:
        raise ValueError(f"partial.num_blocks: {count} blocks are more than the model's {num_layers} layers")
    if isinstance(config.blocks, list):
        if config.blocks[-1] >= num_layers:
            raise ValueError(
                f"partial.blocks: layer {config.blocks[-1]} is out of range; the model has layers 0..{num_layers - 1}"
            )
        return config.blocks
    if config.blocks == "top":
        return list(range(num_layers - count, num_layers))
    if config.blocks == "bottom":
        return list(range(count))
    if num_layers % count:
        fits = ", ".join(str(n) for n in range(1, num_layers + 1) if num_layers % n == 0)
        raise ValueError(
            f"partial.num_blocks: {count} does not divide the model's {num_layers} layers, which evenly needs; "
            f"use one of {fits}"
        )
    step = num_layers // count
    return list(range(step - 1, num_layers, step))
