"""Adapters merged into their weights, and what that changes: the last digits of float32."""

from typing import Any

import torch
from torch import Tensor

from controlllm.distance import read_documents
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.train.adapters import merge_adapters
from controlllm.train.twins import own_weights

LARGEST_DIFFERENCE = 1e-4
"""Of a logit, or as a share of the largest one where that is above 1."""
EVERY_NTH, TOKENS = 20, 128
"""Of the texts that are tried; of each its beginning."""


def merge(model: Any, tokenizer: Any) -> dict[str, float]:
    """Merge the adapters of a float32 model in place, those of twins into weights of the twin's own; says what it cost.

    The model must not be quantised: dequantise it before. UserError where any logit on texts of several kinds moves by
    more than rounding does.
    """
    texts = [document.ids[:TOKENS] for document in read_documents(None, tokenizer)[::EVERY_NTH]]
    model.eval()
    before = _logits(model, texts)
    own_weights(model)
    merge_adapters(model)
    differences = [(a - b).abs().max() for a, b in zip(_logits(model, texts), before, strict=True)]
    moved, largest = float(torch.stack(differences).max()), float(max(logits.abs().max() for logits in before))
    tokens = sum(map(len, texts))
    if not moved <= LARGEST_DIFFERENCE * max(1.0, largest):  # nor if it is not a number
        raise UserError(
            f"merging the adapters moves a logit by {moved:.1e} (the largest is {largest:.3g}), which is more than "
            f"float32 rounds: the adapters have grown out of proportion; train with a lower train.lr or adapter scale"
        )
    console.print(f"  adapters merged in float32: logits moved by at most {moved:.1e} on {tokens} tokens", markup=False)
    return {"largest_logit_difference": moved, "largest_logit": largest, "tokens": tokens}


@torch.no_grad()
def _logits(model: Any, texts: list[list[int]]) -> list[Tensor]:
    """(1, tokens, vocabulary) of each text."""
    return [model(input_ids=torch.tensor([ids]), use_cache=False).logits.float() for ids in texts]
