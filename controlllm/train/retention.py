"""The retention probe: the loss on text of old skills, and how far the model has gone from its base there."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from controlllm.config import RetentionConfig
from controlllm.control.expand import control_blocks, settings_of
from controlllm.control.loss import base_only
from controlllm.data.loader import IGNORED
from controlllm.data.pack import best_fit
from controlllm.data.shelf import PackedRow
from controlllm.errors import UserError
from controlllm.train.passes import Passes, quotient
from controlllm.train.prompt import virtual_tokens_of, without_virtual_tokens

Item = dict[str, Any]


def retention_rows(folder: Path, config: RetentionConfig, tokenizer: Any, context_length: int) -> list[PackedRow]:
    """Items of the probes that stage 1 wrote to `folder`, packed into rows of at most `context_length` tokens.

    The targets are what the benchmark scores: a text, a right answer and the end of its turn. Of a text that does not
    fit the first tokens are taken, of a question and its answer the last. UserError for a probe that is not there.
    """
    documents: list[tuple[int, list[int], int]] = []
    for name in config.probes:
        for item in _items(folder / "probes" / f"{name}.jsonl", name, config.items):
            ids, first = _tokens(item, tokenizer)
            over = max(len(ids) - context_length, 0)
            ids = ids[:context_length] if "text" in item else ids[over:]
            first = first if "text" in item else max(first - over, 1)
            if first < len(ids):
                documents.append((item["id"], ids, first))
    if not documents:
        raise UserError(f"validation.retention.probes: {', '.join(config.probes)} have no text whose loss can be taken")
    bins = best_fit(np.array([len(ids) for _, ids, _ in documents]), context_length)
    return [_row([documents[i] for i in part]) for part in np.split(bins.items, bins.offsets[1:-1])]


def _items(file: Path, name: str, limit: int) -> list[Item]:
    """At most `limit`, spread over the probe."""
    if not file.exists():
        raise UserError(f"validation.retention.probes: '{name}' is not measured in this run; add it to benchmark.old")
    items = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    taken = min(limit, len(items))
    return [items[i * len(items) // taken] for i in range(taken)]


def _tokens(item: Item, tokenizer: Any) -> tuple[list[int], int]:
    """Ids, and which of them is the first target."""
    if "text" in item:
        # As the harness does: the first word is predicted from what stands before every text.
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return [start, *tokenizer.encode(item["text"], add_special_tokens=False)], 1
    if "choices" in item:
        prompt, answer = item["prompt"], f" {item['choices'][item['answer']]}"
    else:
        prompt, answer = item["prompt"], item["target"] + (item.get("eos") or "")
    question = prompt.rstrip()  # white space before a word is a part of the word's token
    bare = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    first = len(tokenizer.encode(question, add_special_tokens=not bare))
    return tokenizer.encode(prompt + answer, add_special_tokens=not bare), max(first, 1)


def _row(documents: Sequence[tuple[int, list[int], int]]) -> PackedRow:
    return {
        "input_ids": np.concatenate([np.array(ids, np.uint32) for _, ids, _ in documents]),
        "target": np.concatenate([np.arange(len(ids)) >= first for _, ids, first in documents]),
        "lengths": np.array([len(ids) for _, ids, _ in documents], np.int32),
        "rows": np.array([number for number, _, _ in documents], np.int64),
    }


class Retention:
    """Made before any step is taken and any checkpoint loaded: what the model gives then is its base's answer."""

    def __init__(self, passes: Passes, rows: Sequence[PackedRow], *, positions: int):
        self.passes, self.rows = passes, rows
        self.places = self._spread(positions)
        with passes.evaluating(self._rounds_of_kl), _as_base(passes.model):
            self.base = dict(passes.own(len(self.places), self._log_probabilities))

    @property
    def rounds(self) -> int:
        return self.passes.rounds(self.passes.batches(self.rows)) + self._rounds_of_kl

    @property
    def _rounds_of_kl(self) -> int:
        return self.passes.rounds(len(self.places))

    def run(self) -> dict[str, float]:
        """retention_loss, nats per target; retention_kl, the mean KL(base || model) in nats over the positions."""
        loss = self.passes.mean_loss(self.rows)
        now = self.passes.own(len(self.places), self._log_probabilities)
        kl = {k: (divergence(self.base[k], there), len(there)) for k, there in now}
        return {"retention_loss": loss, "retention_kl": quotient(self.passes.in_order(kl))}

    def _spread(self, positions: int) -> list[tuple[int, Tensor]]:
        """Batches that hold some of the positions, and the columns in them that predict a chosen target."""
        columns = [_predicting(self.passes.batch(self.rows, k).labels) for k in range(self.passes.batches(self.rows))]
        total = sum(map(len, columns))
        wanted = min(positions, total)
        chosen = torch.arange(wanted) * total // wanted
        places, before = [], 0
        for k, there in enumerate(columns):
            inside = chosen[(chosen >= before) & (chosen < before + len(there))] - before
            before += len(there)
            if len(inside):
                places.append((k, there[inside]))
        return places

    def _log_probabilities(self, place: int) -> Tensor:
        """(positions, vocabulary) of one batch, float32, on the CPU."""
        k, columns = self.places[place]
        arguments = self.passes.arguments(self.passes.batch(self.rows, k))
        del arguments["labels"]
        columns = columns.to(self.passes.world.device)
        logits = self.passes.model(**arguments, logits_to_keep=columns, use_cache=False).logits[0]
        return logits.float().log_softmax(-1).cpu()


@contextmanager
def _as_base(model: Any) -> Iterator[None]:
    """A model with twins or virtual tokens has its base within it, trained or not; any other is the base now."""
    if virtual_tokens_of(model):
        with without_virtual_tokens(model):
            yield
        return
    if not settings_of(model):
        yield
        return
    with base_only(model):
        yield
    for block in control_blocks(model):
        block.trajectory = None  # else it would be the teacher of the next step


def _predicting(labels: Tensor) -> Tensor:
    """labels (1, tokens) → the columns before a target."""
    return (labels[0, 1:] != IGNORED).nonzero().squeeze(-1)


def divergence(base: Tensor, model: Tensor) -> float:
    """Σ over positions of KL(base || model), in nats; both are log-probabilities (positions, vocabulary)."""
    pointwise = F.kl_div(model, base, reduction="none", log_target=True)
    # What the base rules out adds nothing: 0 · log 0 = 0.
    return torch.where(base > float("-inf"), pointwise, 0.0).sum(dtype=torch.float64).item()
