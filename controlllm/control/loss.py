"""What is trained: cross-entropy over the targets plus the divergence of the twins."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from controlllm.control.block import ControlBlock, measuring
from controlllm.control.expand import control_blocks, decoder_layers, settings_of
from controlllm.control.head import HeadLoss, head_gives, is_linear, linear_cross_entropy

IGNORED = -100
# Whether a model's logits are its head's, untouched; known after its first forward pass.
_PLAIN_HEAD: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass
class ControlOutput(CausalLMOutputWithPast):
    """`loss` = `cross_entropy` + `divergence` is what is trained; its parts stand beside it, detached."""

    cross_entropy: Tensor | None = None
    divergence: Tensor | None = None


def forward_with_loss(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    num_tokens_in_batch: Tensor | int | None = None,
    token_mask: Tensor | None = None,
    all_logits: bool = False,
    measure_divergence: bool = True,
    **kwargs: Any,
) -> ControlOutput:
    """Run any Hugging Face causal LM, expanded or plain, and return its loss.

    labels (batch, seq), -100 where nothing is learned; token_mask (batch, seq), False on padding (by default what
    attention_mask says). The counts are targets and tokens of the global batch, so that micro-batches and processes
    add up; by default of this batch. Without `all_logits` the head runs only on positions that have a target, and where
    it is a plain one, together with the loss (head.py).

    loss = Σ cross-entropy / targets + mean over pairs of Σ weight · divergence / tokens (equation 5 of the paper).
    """
    blocks = control_blocks(model) if measure_divergence else []
    if token_mask is None and (mask := kwargs.get("attention_mask")) is not None and mask.ndim == 2:
        token_mask = mask.bool()
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    wanted = shifted != IGNORED
    with measuring(blocks, token_mask):
        _follow_trajectory(model, blocks, input_ids, kwargs)
        run = _with_logits if all_logits else _with_targets_only
        out, entropy = run(model, input_ids, kwargs, wanted, shifted[wanted])
        per_block = [block.divergence for block in blocks if block.divergence is not None]
    entropy = entropy / (wanted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    if num_tokens_in_batch is None:
        num_tokens_in_batch = labels.numel() if token_mask is None else token_mask.sum().clamp(min=1)
    divergence = torch.stack(per_block).mean() / num_tokens_in_batch if per_block else torch.zeros_like(entropy)
    for block in blocks:
        block.divergence = None  # it holds this step's graph
    return ControlOutput(
        loss=entropy + divergence if per_block else entropy,  # type: ignore[arg-type]
        logits=out.logits if all_logits else None,
        past_key_values=out.past_key_values,
        hidden_states=out.hidden_states,
        attentions=out.attentions,
        cross_entropy=entropy.detach(),
        divergence=divergence.detach() if blocks or settings_of(model) else None,
    )


def _with_targets_only(model: Any, input_ids: Tensor | None, kwargs: Any, wanted: Tensor, targets: Tensor) -> Any:
    """The family's forward pass and the summed cross-entropy; logits exist for a chunk of targets at a time, unless the
    family does something to them: then for all targets."""
    if _PLAIN_HEAD.get(model, True) and is_linear(model.get_output_embeddings()):
        sum_of: HeadLoss = getattr(model, "head_loss", linear_cross_entropy)
        with head_gives(model, lambda states, head: sum_of(states[wanted], head.weight, head.bias, targets)) as given:
            out = _forward(model, input_ids, kwargs)
        if _PLAIN_HEAD.setdefault(model, len(given) == 1 and out.logits is given[0]):
            return out, out.logits
    columns = wanted.any(0)
    out = _forward(model, input_ids, kwargs, logits_to_keep=columns.nonzero().squeeze(-1))
    return out, F.cross_entropy(out.logits[wanted[:, columns]].float(), targets, reduction="sum")


def _with_logits(model: Any, input_ids: Tensor | None, kwargs: Any, wanted: Tensor, targets: Tensor) -> Any:
    out = _forward(model, input_ids, kwargs)
    return out, F.cross_entropy(out.logits[wanted].float(), targets, reduction="sum")


def _forward(model: Any, input_ids: Tensor | None, kwargs: dict[str, Any], **more: Any) -> Any:
    """The family's own forward pass, with all it does to its logits."""
    plain = getattr(type(model), "plain_forward", type(model).forward)
    return plain(model, input_ids=input_ids, **more, **kwargs)


def _follow_trajectory(model: Any, blocks: list[ControlBlock], input_ids: Tensor | None, kwargs: Any) -> None:
    """Let every block keep the base model's own hidden state, where that is the teacher."""
    settings = settings_of(model)
    if not blocks or settings is None or settings.teacher != "trajectory" or settings.divergence == "none":
        return
    with torch.no_grad(), base_only(model):
        model.base_model(input_ids=input_ids, **{**kwargs, "use_cache": False})


@contextmanager
def base_only(model: Any) -> Iterator[None]:
    """While inside, the model computes what its base would."""
    settings, blocks = settings_of(model), control_blocks(model)
    layers = decoder_layers(model.base_model)
    stacked = [layers[index] for index in settings.stacked] if settings else []
    handles = [layer.register_forward_hook(lambda _layer, inputs, _output: inputs[0]) for layer in stacked]
    for block in blocks:
        block.base_only = True
    try:
        yield
    finally:
        for block in blocks:
            block.base_only = False
        for handle in handles:
            handle.remove()
