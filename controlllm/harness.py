"""lm-evaluation-harness's Hugging Face model: the same numbers, progress as in the rest of a run, and less work.

Answers to one question share its tokens, and the head runs only where a token is scored (it is a fifth of a small
model, and its logits are most of the memory).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models import huggingface
from torch import Tensor

from controlllm.progress import Advance
from controlllm.train.prompt import virtual_tokens_of

HFLM: Any = huggingface.HFLM  # its registering decorator hides its type
Request = tuple[Any, list[int], list[int]]  # (what the harness calls it, context, continuation)
Answer = tuple[float, bool]  # (log-likelihood of the continuation, whether greedy decoding gives it)


@dataclass
class Question:
    """A context and the continuations that are scored after it."""

    context: list[int]
    continuations: list[tuple[int, list[int]]]  # (place of the request, tokens)

    def __len__(self) -> int:
        return len(self.context) + sum(len(tokens) - 1 for _, tokens in self.continuations)


class CountingLM(HFLM):
    """Counts the sequences that are done."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, advance: Advance):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.advance, self.done = advance, 0

    def count(self, text: str) -> int:
        """Tokens of a text whose every token is scored."""
        return len(self.tok_encode(text))

    def count_after(self, prompt: str, target: str) -> int:
        """Tokens that are scored of a target after its prompt, as the harness splits the two."""
        return len(self._encode_pair(prompt, target)[1])

    @property
    def max_length(self) -> int:
        """Tokens of a text, without the model's virtual ones."""
        virtual = virtual_tokens_of(self.model)
        return super().max_length - (virtual.count if virtual else 0)

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        out = super()._model_generate(context, *args, **kwargs)
        self._count(len(context))
        return out

    def _count(self, more: int) -> None:
        self.done += more
        self.advance(self.done)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Request], *args: Any, **kwargs: Any) -> list[Answer]:
        """The harness's own method where a window or the model's length would cut a sequence; else the one below."""
        longest = max(len(context) + len(continuation) for _, context, continuation in requests)
        if longest > self.max_length or getattr(self.model.config, "sliding_window", None):
            answers = super()._loglikelihood_tokens(requests, *args, **kwargs | {"disable_tqdm": True})
            self._count(len(requests))
            return answers
        return self._score(requests)

    def _score(self, requests: Sequence[Request]) -> list[Answer]:
        questions = sorted(group(requests), key=len, reverse=True)
        answers: dict[int, Answer] = {}
        for start in range(0, len(questions), self.batch_size):
            some = questions[start : start + self.batch_size]
            answers |= score(self.model, some, self.device)
            self._count(sum(len(q.continuations) for q in some))
        return [answers[place] for place in range(len(requests))]


def group(requests: Sequence[Request]) -> list[Question]:
    """Requests by context."""
    questions: dict[tuple[int, ...], Question] = {}
    for place, (_, context, continuation) in enumerate(requests):
        question = questions.setdefault(tuple(context), Question(context, []))
        question.continuations.append((place, continuation))
    return list(questions.values())


@torch.no_grad()
def score(model: Any, questions: list[Question], device: torch.device) -> dict[int, Answer]:
    """One forward pass: every continuation sees its question and itself, not its siblings."""
    width = max(map(len, questions))
    ids = torch.zeros(len(questions), width, dtype=torch.long)
    positions, branch = torch.zeros_like(ids), torch.full_like(ids, -1)  # branch 0 is the question, -1 padding
    wanted: list[tuple[int, list[int], list[int]]] = []  # (place, where its tokens are predicted, its tokens)
    for row, question in enumerate(questions):
        size = end = len(question.context)
        ids[row, :size] = torch.tensor(question.context)
        positions[row, :size], branch[row, :size] = torch.arange(size), 0
        for number, (place, tokens) in enumerate(question.continuations, start=1):
            start, end = end, end + len(tokens) - 1
            ids[row, start:end] = torch.tensor(tokens[:-1], dtype=torch.long)
            positions[row, start:end], branch[row, start:end] = torch.arange(size, size + end - start), number
            wanted.append((place, [row * width + p for p in (size - 1, *range(start, end))], tokens))
    mask = _mask(branch).to(device, next(model.parameters()).dtype)
    out = model.base_model(
        input_ids=ids.to(device), position_ids=positions.to(device), attention_mask=mask, use_cache=False
    )
    places = torch.tensor([p for _, where, _ in wanted for p in where], device=device)
    targets = torch.tensor([t for _, _, tokens in wanted for t in tokens], device=device)
    logits = model.get_output_embeddings()(out.last_hidden_state.flatten(0, 1)[places])
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    log_probabilities = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
    greedy = logits.argmax(-1) == targets
    sizes = [len(tokens) for _, _, tokens in wanted]
    pieces = zip(wanted, log_probabilities.split(sizes), greedy.split(sizes), strict=True)
    return {place: (float(chance.sum()), bool(hit.all())) for (place, _, _), chance, hit in pieces}


def _mask(branch: Tensor) -> Tensor:
    """(rows, width) branch numbers → (rows, 1, width, width) additive mask."""
    width = branch.shape[1]
    earlier = torch.ones(width, width, dtype=torch.bool).tril()
    shared = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    return torch.where(shared & earlier, 0.0, torch.finfo(torch.bfloat16).min)[:, None]
