"""What is trained: cross-entropy over the targets plus the divergence of the twins."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from controlllm.control.expand import control_blocks

IGNORED = -100


@dataclass
class ControlOutput(CausalLMOutputWithPast):
    """`loss` is what is trained; its parts stand beside it, detached: loss = cross_entropy + weight · divergence."""

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
    **kwargs: Any,
) -> ControlOutput:
    """Run any Hugging Face causal LM, expanded or plain, and return its loss.

    labels (batch, seq), -100 where nothing is learned; token_mask (batch, seq), False on padding. The counts are
    targets and tokens of the global batch, so that micro-batches and processes add up; by default of this batch.
    """
    blocks = control_blocks(model)
    if blocks:
        kwargs["token_mask"] = token_mask
    out = model.base_model(input_ids=input_ids, **kwargs)
    entropy, targets = cross_entropy_sum(model, out.last_hidden_state, labels)
    entropy = entropy / (targets if num_items_in_batch is None else num_items_in_batch)
    if num_tokens_in_batch is None:
        num_tokens_in_batch = labels.numel() if token_mask is None else token_mask.sum()
    loss, divergence = entropy, None
    per_block = [block.divergence for block in blocks if block.divergence is not None]
    if model.training and per_block:
        divergence = torch.stack(per_block).mean() / num_tokens_in_batch
        loss = entropy + model.config.control["divergence_weight"] * divergence
    return ControlOutput(
        loss=loss,  # type: ignore[arg-type] - transformers says FloatTensor where any Tensor is meant
        past_key_values=out.past_key_values,
        cross_entropy=entropy.detach(),
        divergence=None if divergence is None else divergence.detach(),
    )


def cross_entropy_sum(model: Any, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, seq, hidden) → summed loss in float32, number of targets.

    The head runs only where there is a target: with a vocabulary of 49,152 it would otherwise be a fifth of the work.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    wanted = shifted != IGNORED
    logits = model.get_output_embeddings()(hidden[wanted]).float()  # (targets, vocabulary)
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return F.cross_entropy(logits, shifted[wanted], reduction="sum"), wanted.sum()
