"""What a training step costs in floating-point operations, to compare Control LLM (arXiv 2501.10979) with its rivals.

Counted are the matrix products, a multiplication and its addition as two. Norms, rotary embedding, softmax, blend,
divergence and optimizer are elementwise and left out, and so is the hidden × hidden map of prog and proj.

A product Y = X·W costs as much again for ∂/∂X, and once more for ∂/∂W where W is trained. Attention's two products have
no weights: backward costs it twice its forward, frozen or not. Below the lowest site no tensor depends on a trained
one, so nothing there is differentiated. With L layers, E sites and l0 the lowest of them:

    forward  = (L + E)(F + A) + H                            F  matrix products of a layer, without attention
    backward = (L - 1 - l0)(F + 2A) + E(2F + 2A) + H         A  attention of a layer,  H  head

Of packed documents every token sees its own only: tokens · seq is then Σ length², and `mean_length` is the seq for it.

The layout does not matter: a stacked copy is one more trained layer, and the frozen layers above the lowest copy are
those above its site.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from controlllm.control.settings import ControlSettings


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of the base model's forward pass over the tokens of one step."""

    layers: int
    """L"""
    matmul: float
    """F: query, key, value, output and MLP projections of one layer."""
    attention: float
    """A: scores and weighted values of one layer."""
    head: float
    """H: logits of the positions that have a target."""

    @property
    def layer(self) -> float:
        """F + A"""
        return self.matmul + self.attention


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a training step, without the optimizer."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def model_flops(
    *,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocabulary: int,
    layers: int,
    seq: float,
    tokens: int,
    targets: int | None = None,
    causal: bool = True,
    mlp_projections: int = 3,
) -> ModelFlops:
    """FLOPs of a dense decoder over `tokens` tokens in sequences (or packed documents) of `seq` tokens.

    targets: positions that the head runs on, by default all. causal: whether the attention kernel leaves out what the
    mask hides, half of the work (flash, SDPA); eager attention does not. mlp_projections: 3 with a gate, 2 without.
    """
    projections = hidden * head_dim * (2 * heads + 2 * kv_heads) + mlp_projections * hidden * intermediate
    return ModelFlops(
        layers=layers,
        matmul=2.0 * tokens * projections,
        attention=4.0 * tokens * heads * head_dim * seq * (0.5 if causal else 1),  # two products with every key
        head=2.0 * (tokens if targets is None else targets) * hidden * vocabulary,
    )


def config_flops(
    config: Any, *, seq: float, tokens: int, targets: int | None = None, causal: bool = True, mlp_projections: int = 3
) -> ModelFlops:
    """`model_flops` of the Hugging Face config of a base model like Llama, Qwen or Mistral."""
    heads = config.num_attention_heads
    return model_flops(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        layers=config.num_hidden_layers,
        seq=seq,
        tokens=tokens,
        targets=targets,
        causal=causal,
        mlp_projections=mlp_projections,
    )


def mean_length(lengths: Sequence[int], *, window: int | None = None) -> float:
    """Σ length² / Σ length: the length of equal documents with as many tokens and pairs of tokens that see each other.

    window: tokens that a token sees at most, itself among them; of n > window tokens, window·(2n - window) / 2 pairs.
    """
    pairs = sum(n * n if window is None or n <= window else window * (2 * n - window) for n in lengths)
    return pairs / max(sum(lengths), 1)


def full_step(base: ModelFlops) -> StepFlops:
    """Full fine-tuning: every layer and the head trained."""
    return StepFlops(base.layers * base.layer + base.head, 2 * base.layers * base.layer + 2 * base.head)


def partial_step(base: ModelFlops, sites: Sequence[int]) -> StepFlops:
    """Fine-tuning of the blocks at `sites` themselves, without twins; everything else is frozen."""
    frozen_above = base.layers - min(sites) - len(sites)
    return StepFlops(base.layers * base.layer + base.head, _backward(base, frozen_above, trained=len(sites)))


def lora_step(base: ModelFlops, *, adapters: float, unused: float = 0.0) -> StepFlops:
    """Low-rank adapters beside frozen layers.

    adapters: forward products of all of them, which cost twice that again in the backward pass. unused: of the backward
    pass over all layers, what lies before the first adapter; no norm is trained, so that ends inside a layer.
    """
    forward = base.layers * base.layer + base.head + adapters
    return StepFlops(forward, base.layers * (base.matmul + 2 * base.attention) + base.head + 2 * adapters - unused)


def control_step(base: ModelFlops, settings: ControlSettings, *, cached_prefix: bool = False) -> StepFlops:
    """Control LLM. cached_prefix: the layers below the lowest site, which training never changes, are not run again."""
    lowest = min(settings.sites)
    run = base.layers + len(settings.sites) - (lowest if cached_prefix else 0)
    if settings.teacher == "trajectory" and settings.divergence != "none":
        run += base.layers  # the base model once more, for its own hidden states
    frozen_above = base.layers - 1 - lowest
    if settings.interpolation == "none" and settings.detach_teacher:  # the frozen halves of pairs are teachers only
        frozen_above -= sum(site > lowest for site in settings.paired_sites)
    return StepFlops(run * base.layer + base.head, _backward(base, frozen_above, trained=len(settings.sites)))


def shared_twin_step(base: ModelFlops, settings: ControlSettings, *, adapters: float, unused: float = 0.0) -> StepFlops:
    """Control LLM whose twins are frozen blocks with adapters: no twin's own weight has a gradient.

    adapters: forward products of those of all twins. unused: of the backward pass over the lowest twin, what lies
    before its first adapter.
    """
    full = control_step(base, settings)
    less = len(settings.sites) * base.matmul + unused
    return StepFlops(full.forward + adapters, full.backward - less + 2 * adapters)


def _backward(base: ModelFlops, frozen_above: int, *, trained: int) -> float:
    frozen = base.matmul + 2 * base.attention
    return frozen_above * frozen + trained * 2 * base.layer + base.head
