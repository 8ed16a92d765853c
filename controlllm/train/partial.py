"""Fine-tuning of some of the model's own blocks: which ones."""

from typing import Any

from controlllm.config import PartialConfig
from controlllm.control.blocks import choose_blocks
from controlllm.control.expand import decoder_layers
from controlllm.control.model import number_of_layers


def train_blocks(model: Any, config: PartialConfig) -> None:
    """Freeze all but the chosen blocks; ValueError where they do not fit the model."""
    chosen = choose_blocks(config, number_of_layers(model))
    layers = decoder_layers(model.base_model)
    model.requires_grad_(False)
    for index in chosen:
        layers[index].requires_grad_(True)
