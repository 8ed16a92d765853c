"""The model in transformers.

Answers to one question share its tokens, questions share the examples before them, and the head runs only where a token
is scored (it is a fifth of a small model, and its logits are most of the memory).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlllm.benchmark.beginnings import common_start, has_virtual, in_batches, run_start
from controlllm.benchmark.decode import decode
from controlllm.benchmark.engine import Answer, Pair, Prompt
from controlllm.tuned import load_tuned

ROWS = 2048  # tokens whose logits are in memory at a time


@dataclass
class Question:
    """A context and the continuations that are scored after it."""

    context: list[int]
    continuations: list[tuple[int, list[int]]]  # (place of the request, tokens)

    def __len__(self) -> int:
        return len(self.context) + sum(len(tokens) - 1 for _, tokens in self.continuations)


class HFEngine:
    """An `Engine` in this process, on the device on which the model is."""

    name = "transformers"

    def __init__(self, model: Any, tokenizer: Any, batch_size: int):
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.shares = shares_questions(model.config)

    def plan(self, requests: Sequence[Any]) -> list[list[int]]:
        return plan(requests, self.batch_size, shared=self.shares)

    def run(self, batches: Sequence[Sequence[Any]]) -> Iterator[tuple[int, list[Any]]]:
        for number, batch in enumerate(batches):
            yield number, self.answer(batch)

    def close(self) -> None:
        """Give the memory back."""
        self.model = None
        torch.cuda.empty_cache()

    def answer(self, batch: Sequence[Any]) -> list[Any]:
        if isinstance(batch[0], Prompt):
            return decode(self.model, self.tokenizer, batch, shared=self.shares)
        questions = group(batch, shared=self.shares)
        found = score(self.model, questions, shared=self.shares)
        return [found[place] for place in range(len(batch))]


def open_engine(model: Path | str, *, dtype: str, batch_size: int) -> HFEngine:
    """On the first visible GPU, or the CPU."""
    from transformers import AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return HFEngine(load_tuned(model, dtype=dtype).to(device), AutoTokenizer.from_pretrained(model), batch_size)


def shares_questions(config: Any) -> bool:
    """Whether a 4-D mask says all of what the model's layers see: not where a window or a state of its own does."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not getattr(config, "sliding_window", None)


def plan(requests: Sequence[Any], batch_size: int, *, shared: bool) -> list[list[int]]:
    """Batches of `batch_size` rows, each a prompt or a question with all its answers, alike beginnings together."""
    if isinstance(requests[0], Prompt):
        return in_batches([prompt.tokens for prompt in requests], batch_size)
    questions = group(requests, shared=shared)
    rows = in_batches([question.context for question in questions], batch_size)
    return [[place for row in batch for place, _ in questions[row].continuations] for batch in rows]


def group(requests: Sequence[Pair], *, shared: bool) -> list[Question]:
    """Requests by context, or each by itself."""
    if not shared:
        return [Question(pair.context, [(place, pair.continuation)]) for place, pair in enumerate(requests)]
    questions: dict[tuple[int, ...], Question] = {}
    for place, pair in enumerate(requests):
        question = questions.setdefault(tuple(pair.context), Question(pair.context, []))
        question.continuations.append((place, pair.continuation))
    return list(questions.values())


@torch.no_grad()
def score(model: Any, questions: list[Question], *, shared: bool) -> dict[int, Answer]:
    """Every continuation sees its question and itself, not its siblings; what all questions begin with is run once."""
    start = common_start([question.context for question in questions]) if shared and not has_virtual(model) else 0
    before = run_start(model, questions[0].context[:start], len(questions)) if start else None
    width = max(map(len, questions)) - start
    ids = torch.zeros(len(questions), width, dtype=torch.long)
    positions, branch = torch.zeros_like(ids), torch.full_like(ids, -1)  # branch 0 is the question, -1 padding
    wanted: list[tuple[int, list[int], list[int]]] = []  # (place, where its tokens are predicted, its tokens)
    for row, question in enumerate(questions):
        size = end = len(question.context) - start
        ids[row, :size] = torch.tensor(question.context[start:])
        positions[row, :size], branch[row, :size] = torch.arange(size), 0
        for number, (place, tokens) in enumerate(question.continuations, start=1):
            first, end = end, end + len(tokens) - 1
            ids[row, first:end] = torch.tensor(tokens[:-1], dtype=torch.long)
            positions[row, first:end], branch[row, first:end] = torch.arange(size, size + end - first), number
            wanted.append((place, [row * width + p for p in (size - 1, *range(first, end))], tokens))
    given: dict[str, Tensor] = {"input_ids": ids}
    if start or any(len(question.continuations) > 1 for question in questions):
        mask = _mask(branch, start).to(next(model.parameters()).dtype)
        given |= {"position_ids": positions + start, "attention_mask": mask}
    # Else a row is one text with its padding behind it, where nothing looks.
    given = {name: tensor.to(model.device) for name, tensor in given.items()}
    out = model.base_model(**given, past_key_values=before, use_cache=before is not None)
    return _answers(model, out.last_hidden_state.flatten(0, 1), wanted)


def _answers(model: Any, states: Tensor, wanted: list[tuple[int, list[int], list[int]]]) -> dict[int, Answer]:
    """states: (tokens, hidden)"""
    places = torch.tensor([p for _, where, _ in wanted for p in where], device=states.device)
    targets = torch.tensor([t for _, _, tokens in wanted for t in tokens], device=states.device)
    chances, greedy = zip(
        *(_chances(model, states[some], of) for some, of in zip(places.split(ROWS), targets.split(ROWS), strict=True)),
        strict=True,
    )
    sizes = [len(tokens) for _, _, tokens in wanted]
    pieces = zip(wanted, torch.cat(chances).split(sizes), torch.cat(greedy).split(sizes), strict=True)
    return {place: (float(chance.sum()), bool(hit.all())) for (place, _, _), chance, hit in pieces}


def _chances(model: Any, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, hidden) → log-probabilities of the targets in float32, and which of them are the likeliest."""
    logits = model.get_output_embeddings()(states)
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    chosen = logits.gather(-1, targets[:, None])[:, 0].float()
    return chosen - logits.float().logsumexp(-1), logits.argmax(-1) == targets


def _mask(branch: Tensor, start: int) -> Tensor:
    """(rows, width) branch numbers → (rows, 1, width, start + width) additive mask; all see what comes before."""
    width = branch.shape[1]
    earlier = torch.ones(width, width, dtype=torch.bool).tril()
    shared = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    mask = torch.where(shared & earlier, 0.0, torch.finfo(torch.bfloat16).min)
    return torch.nn.functional.pad(mask, (start, 0))[:, None]
