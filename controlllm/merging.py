"""Adapters merged into their weights, and what that changes: the last digits of float32."""

from typing import Any

import torch
from torch import Tensor

from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.train.adapters import merge_adapters
from controlllm.train.twins import own_weights

LARGEST_DIFFERENCE = 1e-4
"""Of a logit, or as a share of the largest one where that is above 1."""
TEXTS = (
    "Question: a train leaves at 9:40 and arrives at 13:05. How long does it take? Answer: 3 hours and 25 minutes.",
    "The harbour was quiet that morning, and the gulls, which had cried all night, sat in rows along the wall. She "
    "counted them twice before she noticed that one of them had no shadow at all.",
    "Am Abend zog Nebel über die Felder; nur die Spitze des Kirchturms blieb zu sehen, und irgendwo bellte ein Hund.",
    "机器学习模型在学习新知识的同时，往往会忘记以前学到的内容。怎样才能两者兼得？",
    "def mean(values: list[float]) -> float:\n    if not values:\n        raise ValueError('no values')\n    return "
    "sum(values) / len(values)\n",
    "Let $f(x) = x^2 - 3x + 2$. Then $f(x) = (x - 1)(x - 2)$, so that $f(1) = f(2) = 0$ and $f'(x) = 2x - 3$.",
)
"""Of several kinds, and here, because nothing may be missing when a training is over."""


def merge(model: Any, tokenizer: Any) -> dict[str, float]:
    """Merge the adapters of a float32 model in place, those of twins into weights of the twin's own; says what it cost.

    The model must not be quantised: dequantise it before. UserError where any logit on texts of several kinds moves by
    more than rounding does.
    """
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
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
