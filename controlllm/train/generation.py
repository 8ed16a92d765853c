"""Answers that the model writes by itself to held-back questions, and how near they come to the real ones."""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from controlllm.config import GenerateConfig
from controlllm.data.shelf import PackedRow
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.train.passes import Passes
from controlllm.train.prompt import virtual_tokens_of

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# Kernels of packed rows, that take no mask for padding or compile for every shape.
NOT_FOR_PADDING = ("packed", "flex_attention")
# Written without spaces between words: every character counts as a word.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@dataclass(frozen=True)
class Question:
    """The first one of a conversation."""

    prompt: list[int]
    reference: list[int]
    """The real answer, without the end of its turn."""
    end: int | None
    """The special token that ends the turn; none where the conversation is cut before."""


class Generation:
    """Greedy answers to the first conversations of the held-back rows."""

    def __init__(self, passes: Passes, rows: Sequence[PackedRow], config: GenerateConfig, tokenizer: Any):
        self.passes, self.config, self.tokenizer = passes, config, tokenizer
        self.questions = questions_of(rows, special=set(tokenizer.all_special_ids), items=config.items)
        self.stops = self._stops()
        self.longest_prompt = self._room()
        self.bleu = _bleu(config)
        self.samples: list[dict[str, str]] = []
        """Of the last run: prompt, reference, answer."""
        if not self.questions and passes.world.is_main:
            console.print(
                "  [yellow]validation.generate: no conversation in the held-back rows, so nothing is generated[/]"
            )

    @property
    def rounds(self) -> int:
        return self.passes.rounds(self._batches)

    @property
    def _batches(self) -> int:
        return -(-len(self.questions) // self.config.batch_size)

    def run(self) -> dict[str, float]:
        """rouge1, rouge2, rougeL, rougeLsum: mean F1, 0 to 1; bleu of the corpus, 0 to 100; generated_items."""
        if not self.questions:
            return {}
        with _able_to_generate(self.passes.model):
            mine = dict(self.passes.own(self._batches, self._answers))
        answers = [self._text(ids) for batch in self.passes.in_order(mine) for ids in batch]
        references = [self._text(question.reference) for question in self.questions]
        prompts = [self.tokenizer.decode(question.prompt) for question in self.questions]
        self.samples = [
            {"prompt": prompt, "reference": reference, "answer": answer}
            for prompt, reference, answer in zip(prompts, references, answers, strict=True)
        ]
        bleu = self.bleu.corpus_score(answers, [references]).score
        return {**rouge(references, answers), "bleu": bleu, "generated_items": len(answers)}

    def _answers(self, k: int) -> list[list[int]]:
        """Tokens of one batch's answers, up to the end of the turn."""
        size = self.config.batch_size
        prompts = [q.prompt[-self.longest_prompt :] for q in self.questions[k * size : (k + 1) * size]]
        width = max(map(len, prompts))
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
        device = self.passes.world.device
        made = self.passes.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=self.config.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=sorted(self.stops),
            pad_token_id=pad,
            # A process whose answers are done goes on as long as others need its share of the weights.
            synced_gpus=self.passes.sharded and self.passes.world.size > 1,
        )
        return [self._until_stop(row) for row in made[:, width:].tolist()]

    def _until_stop(self, ids: list[int]) -> list[int]:
        return ids[: next((i for i, token in enumerate(ids) if token in self.stops), len(ids))]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _stops(self) -> set[int]:
        """What ends a turn in the data, in the base's generation_config and for the tokenizer."""
        own = self.passes.model.generation_config.eos_token_id
        known = own if isinstance(own, list) else [own]
        ends = [*known, self.tokenizer.eos_token_id, *(question.end for question in self.questions)]
        return {int(token) for token in ends if token is not None}

    def _room(self) -> int:
        positions = getattr(self.passes.model.config, "max_position_embeddings", None) or 10**9
        if self.config.max_new_tokens >= positions:
            raise UserError(
                f"validation.generate.max_new_tokens {self.config.max_new_tokens}: the model has only {positions} "
                "positions, for question and answer; lower it"
            )
        virtual = virtual_tokens_of(self.passes.model)
        return positions - self.config.max_new_tokens - (virtual.count if virtual else 0)


def questions_of(rows: Sequence[PackedRow], *, special: set[int], items: int) -> list[Question]:
    """Of the first `items` documents that have something before what is learned, and an answer."""
    found: list[Question] = []
    for row in rows:
        for begin, end in pairwise([0, *np.cumsum(row["lengths"]).tolist()]):
            if len(found) == items:
                return found
            if question := _question(row["input_ids"][begin:end], row["target"][begin:end], special):
                found.append(question)
    return found


def _question(ids: np.ndarray, target: np.ndarray, special: set[int]) -> Question | None:
    if not target.any() or target[0]:
        return None
    first = int(target.argmax())
    length = int(np.append(~target[first:], True).argmax())
    answer = ids[first : first + length].tolist()
    last = max((place for place, token in enumerate(answer) if token in special), default=None)
    reference = answer[:last]
    if all(token in special for token in reference):
        return None
    return Question(ids[:first].tolist(), reference, None if last is None else answer[last])


@contextmanager
def _able_to_generate(model: Any) -> Iterator[None]:
    """Greedy, whatever sampling the base's generation_config asks for; attention that knows padding; and blocks as they
    are written, because every length of the cache would be compiled anew."""
    kernel, kept = model.config._attn_implementation, model.generation_config
    model.generation_config = type(kept)()
    if kernel in NOT_FOR_PADDING:
        model.set_attn_implementation("sdpa")
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        model.generation_config = kept
        model.set_attn_implementation(kernel)


def rouge(references: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Mean F1 of each kind over pairs of texts."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, tokenizer=_Words())
    scores = [scorer.score(reference, answer) for reference, answer in zip(references, answers, strict=True)]
    return {kind: math.fsum(score[kind].fmeasure for score in scores) / len(scores) for kind in ROUGE}


class _Words:
    """What rouge_score asks for. Its own tokenizer drops all letters but a to z."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case; single characters in scripts without spaces."""
    found: list[str] = []
    inside = marked = False  # whether the next letter, the next mark belongs to the last word
    for character in unicodedata.normalize("NFC", text).lower():
        kind = unicodedata.category(character)[0]
        if kind in "LN":
            alone = unicodedata.name(character, "").startswith(UNSPACED)
            if inside and not alone:
                found[-1] += character
            else:
                found.append(character)
            inside, marked = not alone, True
        elif kind == "M" and marked:
            found[-1] += character
        else:
            inside = marked = False
    return found


def _bleu(config: GenerateConfig) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    try:
        return BLEU(tokenize=config.bleu_tokenize, force=True)
    except RuntimeError:  # it asks for a package that is not installed
        raise UserError(
            f"validation.generate.bleu_tokenize {config.bleu_tokenize} needs more packages: "
            f"pip install 'sacrebleu[{config.bleu_tokenize[:2]}]', or choose another"
        ) from None
