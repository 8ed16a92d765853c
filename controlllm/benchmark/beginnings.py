"""What the texts of a batch begin with, run once for all of them: the worked examples of a task, a system prompt."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

WORTH = 32  # tokens: a shorter common start costs more than it saves


def in_batches(texts: Sequence[list[int]], batch_size: int) -> list[list[int]]:
    """Places of texts. Those that share half or more of their tokens stand together, else the lengths decide.

    The long ones come first: too little memory shows at once, and the short ones fill the end.
    """
    order = sorted(range(len(texts)), key=lambda place: texts[place])
    alike = [[place] for place in order[:1]]
    for before, place in pairwise(order):
        if 2 * _same(texts[before], texts[place]) >= len(texts[place]):
            alike[-1].append(place)
        else:
            alike.append([place])
    groups = [places for places in alike if len(places) >= batch_size]
    groups.append([place for places in alike if len(places) < batch_size for place in places])
    batches = []
    for places in groups:
        places.sort(key=lambda place: len(texts[place]), reverse=True)
        batches += [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    return sorted(batches, key=lambda batch: len(texts[batch[0]]), reverse=True)


def common_start(texts: Sequence[list[int]]) -> int:
    """Tokens that all begin with, one less than any of them has: each has to say by itself what follows."""
    start = min(_same(min(texts), max(texts)), min(map(len, texts)) - 1)  # the two ends of the alphabet differ first
    return start if start >= WORTH and len(texts) > 1 else 0


def has_virtual(model: Any) -> bool:
    """Virtual tokens are put before a text by the pass that has no cache yet."""
    return bool(getattr(model.config, "prompt", None))


def run_start(model: Any, tokens: list[int], rows: int) -> Any:
    """The cache after the tokens, for a batch of `rows`."""
    cache = model.base_model(input_ids=torch.tensor([tokens], device=model.device), use_cache=True).past_key_values
    cache.batch_repeat_interleave(rows)
    return cache


def _same(one: list[int], other: list[int]) -> int:
    """Tokens at the start that are the same."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
