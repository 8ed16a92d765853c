"""What a decoder block keeps for the backward pass, by the tensors that autograd keeps in each of its parts.

Per token, with c bytes per number in products, r in the residual stream, n = heads · head_dim, m the same of the keys:

    norms       2 inputs in float32; their normalised values (r) where the norm is trained
    attention   query, key, value, output: 2(n + m)·c, and a float32 per head
    MLP         gate, its activation, up: 3·intermediate·c
    products    their inputs, where their weights are trained: 2·hidden + n + intermediate, in c

Where autocast converts, each of query, key and value (gate and up) has a converted input of its own, and the converted
weights are kept, too. bench/memory.py compares this with what is measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from controlllm.adapter_memory import Adapter, adapter_kept, adapter_products, adapter_weights, length_products, targets
from controlllm.config import LoRAConfig, QuantizationConfig, RunConfig
from controlllm.control.blocks import choose_blocks
from controlllm.control.settings import ControlSettings
from controlllm.model_shape import Decoder
from controlllm.quantized_memory import bytes_saved, product_bytes


@dataclass(frozen=True)
class Numbers:
    """Bytes per number while training."""

    frozen: int
    """Storage of frozen weights."""
    trained: int
    """Storage of trained weights."""
    frozen_seen: int
    """As the forward pass sees them: FSDP gathers in another type."""
    trained_seen: int
    compute: int
    """Of products."""
    residual: int
    """Of hidden states between blocks."""
    autocast: bool
    """Whether weights and inputs of another type are converted for each product."""
    lean: bool
    """Whether norms and MLP are fused kernels, which keep their inputs only."""


@dataclass(frozen=True)
class Block:
    """Bytes of one block, in the order of the forward pass; of a pair both are blocks."""

    weights: int
    """Numbers, not bytes."""
    trained: int
    """Of them; all, none, or those of adapters."""
    in_graph: bool
    """Whether the backward pass comes through it."""
    kept: int = 0
    """Until its backward pass."""
    copies: int = 0
    """Converted weights that are kept as long."""
    cached: int = 0
    """Converted trained weights that autocast keeps until the forward pass is over."""
    blend: int = 0
    """What the blend with its frozen block keeps."""
    working: int = 0
    """While its backward pass begins: what is computed again, and gradients on their way."""
    forward: int = 0
    """While its forward pass runs."""
    saved: int = 0
    """Bytes that its frozen weights take less, because they are quantised."""


@dataclass(frozen=True)
class Sizes:
    """Everything a block's bytes depend on."""

    decoder: Decoder
    numbers: Numbers
    tokens: int
    """Of one forward pass."""
    checkpointing: Literal["none", "selective", "full"]
    attention: str
    adapter: Adapter | None
    quantization: QuantizationConfig | None = None


def blocks(config: RunConfig, sizes: Sizes, *, layers: int) -> list[Block]:
    """All blocks in the order in which they run, of a pair the frozen one first. ValueError where sites do not fit."""
    if config.control:
        settings = ControlSettings.resolve(config.control, num_layers=layers)
        return list(_expanded(settings, sizes, layers, shared=config.control.twin != "full"))
    if config.partial:
        chosen = choose_blocks(config.partial, layers)
        return [_block(sizes, trained=i in chosen, below=i <= min(chosen)) for i in range(layers)]
    everything = config.method.trains_all
    return [_block(sizes, trained=everything, below=bool(sizes.adapter) and i == 0) for i in range(layers)]


def _expanded(settings: ControlSettings, sizes: Sizes, layers: int, *, shared: bool) -> Iterator[Block]:
    """shared: the adapters are the twins', which have the frozen blocks' weights."""
    plain, lowest = replace(sizes, adapter=None), min(settings.sites)
    teacher_only = settings.interpolation == "none" and settings.detach_teacher
    for layer in range(layers):
        paired = layer in settings.paired_sites
        # No gradient reaches what lies below the first trained block, nor a frozen block that is nothing but a teacher.
        frozen = _block(plain, trained=False, below=layer <= lowest or (paired and teacher_only))
        yield frozen
        if paired or layer in settings.stacked_sites:
            blend = _blend(settings, sizes) if paired else 0
            partner = paired and frozen.in_graph
            twin = _block(sizes, trained=not shared, below=layer == lowest, partner=partner, blend=blend)
            yield replace(twin, weights=twin.trained, saved=0) if shared else twin


def _block(sizes: Sizes, *, trained: bool, below: bool, partner: bool = False, blend: int = 0) -> Block:
    """below: its input needs no gradient; partner: that input is kept by the frozen block already."""
    decoder, numbers, mode = sizes.decoder, sizes.numbers, sizes.checkpointing
    adapters = adapter_weights(decoder, sizes.adapter)
    weights, own = decoder.block + adapters, decoder.block if trained else adapters
    forward = sizes.tokens * (4 * decoder.intermediate * numbers.compute + 3 * decoder.hidden * numbers.residual)
    quantization = None if trained else sizes.quantization
    saved = bytes_saved(quantization, decoder, stored=numbers.frozen)
    dequantised = product_bytes(quantization, decoder, compute=numbers.compute)
    forward += dequantised
    if not own and below:
        return Block(weights, own, in_graph=False, forward=forward, saved=saved)
    everything = sizes.tokens * _kept(sizes, trained=trained, below=below, partner=partner)
    copies, cached = _copies(sizes, trained=trained, adapters=adapters)
    on_the_way = sizes.tokens * 2 * (decoder.intermediate * numbers.compute + decoder.hidden * numbers.residual)
    on_the_way += dequantised
    if trained:  # the first gradient of the block: of its largest matrix, and before it was converted
        conversion = numbers.compute if numbers.autocast and numbers.trained_seen != numbers.compute else 0
        on_the_way += decoder.hidden * decoder.intermediate * (numbers.trained_seen + conversion)
    if mode == "none":
        return Block(weights, own, True, everything, copies, 0, blend, on_the_way, forward, saved)
    products = 0 if mode == "full" else sizes.tokens * _products(sizes) + length_products(decoder, sizes.adapter)
    kept = products + (0 if partner else sizes.tokens * decoder.hidden * numbers.residual)
    again = max(everything + copies - sizes.tokens * _products_in_use(sizes) * bool(products), 0)
    return Block(weights, own, True, kept, 0, cached, blend, again + on_the_way, forward, saved)


def _kept(sizes: Sizes, *, trained: bool, below: bool, partner: bool) -> int:
    """Bytes per token without activation checkpointing."""
    decoder, numbers = sizes.decoder, sizes.numbers
    hidden, inner, queries = decoder.hidden, decoder.intermediate, decoder.heads * decoder.head_dim
    norm = hidden * (numbers.residual if numbers.lean else 4)
    shared = partner and norm == hidden * numbers.residual  # the block's input itself
    norms = norm * (2 - (below or shared)) + 8
    mlp = (2 if numbers.lean else 3) * inner * numbers.compute
    total = norms + _attention(sizes) + mlp
    if trained and not numbers.lean:
        total += 2 * hidden * numbers.residual
    if trained or isinstance(sizes.adapter, LoRAConfig):
        total += numbers.compute * sum(_inputs(sizes))
    if trained and sizes.attention.startswith("flash"):
        total -= numbers.compute * queries  # the kernel's output is the next product's input
    return total + adapter_kept(decoder, sizes.adapter, compute=numbers.compute)


def _inputs(sizes: Sizes) -> list[int]:
    """Widths of the inputs that products with trained weights keep."""
    decoder, numbers = sizes.decoder, sizes.numbers
    seen = numbers.residual if numbers.lean else max(numbers.residual, numbers.trained_seen)
    converted = numbers.autocast and seen != numbers.compute
    adapted = targets(sizes.adapter)
    groups = [adapted & {"q_proj", "k_proj", "v_proj"}, adapted & {"gate_proj", "up_proj"}]
    widths = [decoder.hidden * (len(group) if converted else min(len(group), 1)) for group in groups]
    widths.append(decoder.heads * decoder.head_dim if "o_proj" in adapted else 0)
    return [*widths, decoder.intermediate if "down_proj" in adapted else 0]


def _attention(sizes: Sizes) -> int:
    decoder, numbers = sizes.decoder, sizes.numbers
    queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    if sizes.attention == "eager":  # the whole map, in float32 and as it is multiplied
        maps = decoder.heads * sizes.tokens * (4 + numbers.compute % 4)
        return maps + 3 * queries * numbers.compute
    if sizes.attention == "sdpa":  # keys and values repeated for every head
        keys = queries
    return 2 * (queries + keys) * numbers.compute + 4 * decoder.heads


def _products(sizes: Sizes) -> int:
    """Bytes per token of a block's products and attention."""
    decoder, numbers = sizes.decoder, sizes.numbers
    queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    products = queries + 2 * keys + 2 * decoder.hidden + 2 * decoder.intermediate
    products += adapter_products(decoder, sizes.adapter)
    return (products + queries) * numbers.compute + 4 * decoder.heads


def _products_in_use(sizes: Sizes) -> int:
    """Those that stand for what would otherwise be kept: value, attention's output, gate and up."""
    decoder = sizes.decoder
    width = decoder.head_dim * (decoder.heads + decoder.kv_heads) + 2 * decoder.intermediate
    return width * sizes.numbers.compute


def _copies(sizes: Sizes, *, trained: bool, adapters: int) -> tuple[int, int]:
    """Bytes of converted weights: all that a backward pass needs, and those of them that autocast caches."""
    decoder, numbers = sizes.decoder, sizes.numbers
    if not numbers.autocast:
        return 0, 0
    own = decoder.block_matrices if trained else adapters
    others = 0 if trained or sizes.quantization else decoder.block_matrices
    cached = numbers.compute * own * (numbers.trained_seen != numbers.compute)
    return cached + numbers.compute * others * (numbers.frozen_seen != numbers.compute), cached


def _blend(settings: ControlSettings, sizes: Sizes) -> int:
    """Bytes that blend and divergence keep (control/blend.py)."""
    residual, state = sizes.numbers.residual, sizes.tokens * sizes.decoder.hidden
    measured = settings.divergence != "none"
    if settings.teacher == "trajectory" and measured:
        return state * (3 * residual + 4)
    plain = settings.interpolation in ("lerp", "none", "dlerpin", "moe", "moe_hard", "proj")
    if settings.divergence in ("mse", "none", "attention") and plain and settings.interpolation != "proj":
        return state * residual * (measured or settings.interpolation != "none")
    if settings.interpolation == "prog" or residual < 4:
        return 2 * state * residual
    return state * residual  # the blend itself is the next block's input, which that keeps
