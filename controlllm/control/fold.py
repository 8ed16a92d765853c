"""Folding: each pair becomes one block again, in weight space, and the model the plain architecture it came from."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from controlllm.control.block import ControlBlock
from controlllm.control.expand import decoder_layers, settings_of
from controlllm.control.interpolation import Weights
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError

Alphas = Mapping[int, float]
"""Weight of the twin by base layer."""
Twin = tuple[Tensor, float]


def fold_model(
    model: PreTrainedModel, alphas: Alphas, *, other: tuple[PreTrainedModel, Alphas] | None = None
) -> PreTrainedModel:
    """The plain model with (1-alpha)·frozen + alpha·twin at each site (Wortsman et al. 2022), the rest the same memory.

    With `other`, a second run over the same base: base + Σ alpha·(twin - base), task arithmetic (Ilharco et al. 2023).
    """
    runs = [(model, alphas)] if other is None else [(model, alphas), other]
    for each, its in runs:
        _check_alphas(check_foldable(settings_of(each), merged=other is not None), its)
    tensors = base_tensors(model)
    if other is not None:
        _check_same_base(tensors, base_tensors(other[0]))
    twins: dict[str, list[Twin]] = {}
    for each, its in runs:
        for name, twin in _twins(each, its):
            twins.setdefault(name, []).append(twin)
    tensors |= {name: _folded(tensors[name], found) for name, found in twins.items()}
    config = plain_config(model.config)
    stock: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return stock.from_pretrained(None, config=config, state_dict=tensors, dtype=model.dtype)


@torch.no_grad()
def measure_alphas(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[int, float]:
    """The mean weight of each twin's output, by base layer, over the tokens that the batches' attention masks keep.

    Batches are what the model's forward takes; they are not looked at where each site has one weight for all tokens.
    """
    settings, blocks = check_foldable(settings_of(model)), pairs(model)
    decoder: Any = model.base_model
    means = site_alphas(model)
    gated = {site: block for site, block in blocks.items() if means[site] is None}
    totals, count = dict.fromkeys(gated, 0.0), 0
    with _kept_weights(gated) as alphas:
        for batch in batches if gated else ():
            decoder(**batch, use_cache=False)
            counts = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()  # (batch, seq)
            count += int(counts.sum())
            for site in gated:
                totals[site] += float(alphas[site].squeeze(-1)[counts].double().sum())
    if gated and not count:
        raise UserError(f"control.interpolation: {settings.interpolation} has a weight per token; give text to measure")
    found = means | {site: total / count for site, total in totals.items()}
    return {site: settings.alpha_scale * alpha for site, alpha in found.items() if alpha is not None}


@torch.no_grad()
def site_alphas(model: PreTrainedModel) -> dict[int, float | None]:
    """The weight of each twin's output, by base layer; None where each token has its own. Reads no other weights."""
    decoder: Any = model.base_model
    return {site: _site_alpha(block, decoder.config.hidden_size) for site, block in pairs(model).items()}


def check_foldable(settings: ControlSettings | None, *, merged: bool = False) -> ControlSettings:
    """UserError for what the plain architecture has no place for, and for stacked layers where runs are merged."""
    if settings is None:
        raise UserError("config.json has no control: it is a plain model, there is nothing to fold")
    if settings.layout == "stack":
        raise UserError("control.layout: stack is already a plain model with more layers; use it as it is")
    if settings.layout == "hybrid" and (merged or settings.alpha_scale != 1):
        found = "another run" if merged else f"control.alpha_scale {settings.alpha_scale:g}"
        raise UserError(f"control.layout: hybrid has stacked layers, that cannot be folded with {found}; use concat")
    if settings.interpolation == "prog":
        raise UserError(
            "control.interpolation: prog maps the frozen output, the plain architecture has no place for the map; "
            "serve the checkpoint as it is, or train with lerp"
        )
    if settings.norm_relaxation != 0:
        raise UserError(
            f"control.norm_relaxation: {settings.norm_relaxation} has no place in the plain architecture; "
            "serve the checkpoint as it is, or train with 0"
        )
    return settings


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The base architecture's config of an expanded model's."""
    gone = ("control", "base_model_type", "model_type", "architectures")
    values = {name: value for name, value in config.to_dict().items() if name not in gone}
    base = CONFIG_MAPPING[config.base_model_type]
    plain = base.from_dict(values | {"architectures": [AutoModelForCausalLM._model_mapping[base].__name__]})  # type: ignore[union-attr]
    plain._attn_implementation = config._attn_implementation
    return plain


def base_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is not a twin's or an interpolation's, by its name in the plain model."""
    blocks = tuple(f"{name}." for name in _names(model).values())
    kept = {}
    for name, tensor in model.state_dict().items():
        if prefix := next((block for block in blocks if name.startswith(block)), None):
            if not name.startswith(f"{prefix}frozen."):
                continue
            name = prefix + name.removeprefix(f"{prefix}frozen.")
        kept[name] = tensor
    return kept


def pairs(model: PreTrainedModel) -> dict[int, ControlBlock]:
    """The pairs by base layer."""
    settings, layers = settings_of(model), decoder_layers(model.base_model)
    assert settings is not None
    return {site: layers[i] for site, i in zip(settings.paired_sites, settings.paired, strict=True)}  # type: ignore[misc]


def _names(model: PreTrainedModel) -> dict[int, str]:
    names = {module: name for name, module in model.named_modules()}
    return {site: names[block] for site, block in pairs(model).items()}


def _twins(model: PreTrainedModel, alphas: Alphas) -> Iterator[tuple[str, Twin]]:
    """Each twin's tensors by their names in the plain model."""
    names = _names(model)
    for site, block in pairs(model).items():
        for name, tensor in block.expanded.state_dict().items():
            yield f"{names[site]}.{name}", (tensor, alphas[site])


@torch.no_grad()
def _folded(frozen: Tensor, twins: list[Twin]) -> Tensor:
    """In float32, stored as the frozen one; exact at 0 and 1, and where twin and frozen are equal."""
    if not frozen.is_floating_point():
        return frozen
    exact = frozen.float()
    if len(twins) == 1:
        (twin, alpha), *_ = twins
        return torch.lerp(exact, twin.float(), alpha).to(frozen.dtype)
    moved = [alpha * (twin.float() - exact) for twin, alpha in twins]
    return (exact + sum(moved[1:], moved[0])).to(frozen.dtype)  # the same for either order of two runs


def _check_alphas(settings: ControlSettings, alphas: Alphas) -> None:
    wanted = settings.paired_sites
    if sorted(alphas) != sorted(wanted):
        raise UserError(f"alpha: given for the layers {sorted(alphas)}; the checkpoint has pairs at {sorted(wanted)}")
    for site, alpha in alphas.items():
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha: {alpha} at layer {site} is not within 0..1")


def _check_same_base(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    for name in {**mine, **other}:
        a, b = mine.get(name), other.get(name)
        if a is None or b is None:
            raise UserError(f"the two runs have different bases: only one has the frozen tensor '{name}'")
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b.to(a.device)):
            raise UserError(f"the two runs have different bases: their frozen tensors '{name}' are not equal")


def _site_alpha(block: ControlBlock, hidden_size: int) -> float | None:
    """The weight of a site that has one for all tokens."""
    like = next(block.interpolation.parameters(), torch.empty(0))
    nothing = like.new_zeros(1, 1, hidden_size)
    alpha = block.interpolation.weights(nothing, nothing, nothing).alpha
    return alpha.item() if alpha.ndim == 1 else None


@contextmanager
def _kept_weights(blocks: Mapping[int, ControlBlock]) -> Iterator[dict[int, Tensor]]:
    """While inside, the alpha (batch, seq, 1) that each block used last."""
    kept: dict[int, Tensor] = {}

    def keep(site: int, weights: Any) -> Any:
        def kept_weights(frozen: Tensor, expanded: Tensor, inputs: Tensor) -> Weights:
            found = weights(frozen, expanded, inputs)
            kept[site] = found.alpha
            return found

        return kept_weights

    for site, block in blocks.items():
        block.interpolation.weights = keep(site, block.interpolation.weights)
    try:
        yield kept
    finally:
        for block in blocks.values():
            del block.interpolation.weights
