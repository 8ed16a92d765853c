"""What a block's frozen matrices take in fewer bits, and what multiplying them takes (train/quantize.py)."""

from controlllm.config import QuantizationConfig
from controlllm.model_shape import Decoder

NF4_BLOCK, SCALES_BLOCK = 64, 256
"""Weights that share a scale; with double_quant, scales that share one of theirs."""


def bytes_saved(quantization: QuantizationConfig | None, decoder: Decoder, *, stored: int) -> int:
    """Of a block. stored: bytes per number of a weight that is not quantised."""
    if quantization is None:
        return 0
    return decoder.block_matrices * stored - _bytes(quantization, decoder)


def _bytes(quantization: QuantizationConfig, decoder: Decoder) -> int:
    matrices = decoder.block_matrices
    if quantization.kind != "nf4":  # a float32 scale for each output
        keys = decoder.head_dim * decoder.kv_heads
        outputs = decoder.heads * decoder.head_dim + 2 * keys + 2 * decoder.hidden + 2 * decoder.intermediate
        return matrices + 4 * outputs
    scales = matrices // NF4_BLOCK
    if not quantization.double_quant:
        return matrices // 2 + 4 * scales
    maps = 7 * 4 * (256 + 1)  # of each of seven matrices: what the scales' codes stand for, and their mean
    return matrices // 2 + scales + 4 * scales // SCALES_BLOCK + maps


def product_bytes(quantization: QuantizationConfig | None, decoder: Decoder, *, compute: int) -> int:
    """Of the largest matrix while it is dequantised: with a scale by row, first in float32."""
    if quantization is None:
        return 0
    largest = decoder.hidden * decoder.intermediate
    if quantization.kind == "nf4":
        return largest * compute + 4 * largest // NF4_BLOCK * quantization.double_quant
    return largest * (4 + compute % 4)
