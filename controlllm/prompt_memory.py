"""What virtual tokens add to the memory of a step."""

from math import ceil

from controlllm.config import RunConfig
from controlllm.model_shape import Decoder

DOCUMENT = 256
"""Tokens that a document is taken to have: the data is not known when memory is predicted."""


def row_tokens(config: RunConfig) -> int:
    """Of a packed row with the virtual tokens of its documents."""
    length = config.pack.context_length
    virtual = config.prompt.num_virtual_tokens if config.prompt else 0
    return length + virtual * ceil(length / DOCUMENT)


def virtual_numbers(config: RunConfig, decoder: Decoder, layers: int) -> int:
    """Embeddings of a prompt, keys and values of a prefix."""
    if config.prompt is None:
        return 0
    width = decoder.hidden if config.prompt.kind == "prompt" else layers * 2 * decoder.kv_heads * decoder.head_dim
    return config.prompt.num_virtual_tokens * width
