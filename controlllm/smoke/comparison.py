"""Where two engines differ: their greedy tokens place by place, and how sure each was where they first part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from controlllm.smoke.greedy import Greedy, Likely

Words = Callable[[list[int]], str]


@dataclass(frozen=True)
class Comparison:
    agreement: float
    """Share of equal tokens, place by place; what only one engine gave is not equal."""
    equal_prompts: float
    """Share of prompts whose tokens are all equal."""
    logprob_difference: float
    """The largest between log-probabilities of one token, of all before the first difference of their prompt."""
    differences: list[dict[str, Any]]
    """The first of every prompt that has one."""


def compare(ours: Sequence[Greedy], theirs: Sequence[Greedy], *, words: Words) -> Comparison:
    """ours: of transformers, theirs: of vLLM, prompt by prompt. words: makes text of tokens."""
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip_longest(a.tokens, b.tokens)]
    apart = [_first_difference(a, b) for a, b in zip(ours, theirs, strict=True)]
    return Comparison(
        agreement=sum(a == b for a, b in pairs) / len(pairs),
        equal_prompts=apart.count(None) / len(apart),
        logprob_difference=max(
            (_logprob_difference(a, b, place) for a, b, place in zip(ours, theirs, apart, strict=True)), default=0.0
        ),
        differences=[
            _described(number, place, a, b, words)
            for number, (a, b, place) in enumerate(zip(ours, theirs, apart, strict=True), start=1)
            if place is not None
        ],
    )


def _first_difference(ours: Greedy, theirs: Greedy) -> int | None:
    both = zip_longest(ours.tokens, theirs.tokens)
    return next((place for place, (a, b) in enumerate(both) if a != b), None)


def _logprob_difference(ours: Greedy, theirs: Greedy, end: int | None) -> float:
    both = zip(ours.logprobs[:end], theirs.logprobs[:end], strict=True)
    return max((abs(a - b) for a, b in both), default=0.0)


def _described(number: int, place: int, ours: Greedy, theirs: Greedy, words: Words) -> dict[str, Any]:
    sides = {"transformers": _side(ours, place, words), "vllm": _side(theirs, place, words)}
    return {"prompt": number, "token": place + 1, **sides}


def _side(answer: Greedy, place: int, words: Words) -> dict[str, Any] | None:
    """None where the answer has ended before."""
    if place >= len(answer.tokens):
        return None
    likely = answer.likely[place][:2]
    return {
        "chosen": words([answer.tokens[place]]),
        "top": [{"token": token, "text": words([token]), "logprob": value} for token, value in likely],
        "margin": _margin(likely),
    }


def _margin(likely: Likely) -> float:
    """How much likelier the first is than the second, in nats; about 0 is a tie, which rounding may decide."""
    return likely[0][1] - likely[1][1]


def told(difference: dict[str, Any]) -> str:
    """A difference in one line."""
    sides = []
    for name, side in (("transformers", difference["transformers"]), ("vLLM", difference["vllm"])):
        sides.append(f"{name} {side['chosen']!r} (margin {side['margin']:.2g})" if side else f"{name} nothing")
    return f"prompt {difference['prompt']} differs first at token {difference['token']}: {', '.join(sides)}"
