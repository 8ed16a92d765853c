"""What was looked at, each by name: passed, failed, or not seen."""

from collections.abc import Sequence
from typing import Any, Literal

from controlllm.config import SmokeConfig
from controlllm.smoke.comparison import Comparison, told
from controlllm.smoke.greedy import Greedy

Check = dict[str, Any]
Found = Literal["passed", "failed", "not seen"]


def check(name: str, found: Found | bool, said: str) -> Check:
    result = found if isinstance(found, str) else "passed" if found else "failed"
    return {"name": name, "result": result, "said": said}


def non_empty(ours: Sequence[Greedy], theirs: Sequence[Greedy], stop: Sequence[int]) -> Check:
    """A model may answer with nothing; the server must not where transformers does not, and not always."""
    empty, both = [_is_empty(a, stop) for a in theirs], [_is_empty(a, stop) for a in ours]
    alone = sum(b and not a for a, b in zip(both, empty, strict=True))
    said = f"{len(empty) - sum(empty)} of {len(empty)} answers have text"
    return check("non-empty", not alone and not all(empty), said + (f"; {alone} only in transformers" if alone else ""))


def stops(ours: Sequence[Greedy], theirs: Sequence[Greedy], stop: Sequence[int]) -> Check:
    """At an EOS of the model's files, by the server's own settings, wherever transformers does."""
    ended = sum(answer.finish == "stop" for answer in theirs)
    ran_on = [n for n, a in enumerate(theirs, start=1) if set(a.tokens[:-1]) & set(stop)]
    ran_on += [n for n, a in enumerate(theirs, start=1) if a.finish == "stop" and a.tokens[-1:] != _eos(a, stop)]
    if ran_on:
        return check("stops at EOS", False, f"the answer to prompt {ran_on[0]} does not end at its EOS")
    missed = [
        n
        for n, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1)
        if a.tokens == b.tokens and a.finish != b.finish
    ]
    if missed:
        return check("stops at EOS", False, f"the answer to prompt {missed[0]} ends there in one engine only")
    if not ended:
        return check("stops at EOS", "not seen", f"none of {len(theirs)} answers ended in time")
    return check("stops at EOS", True, f"{ended} of {len(theirs)} answers ended at one of {list(stop)}")


def equal_tokens(found: Comparison, config: SmokeConfig) -> Check:
    said = (
        f"{found.agreement:.1%} of the tokens are those of transformers, {found.equal_prompts:.1%} of the answers whole"
    )
    said += f"; {told(found.differences[0])}" if found.differences else ""
    return check("greedy tokens", found.agreement >= config.min_agreement, said)


def equal_chances(found: Comparison, config: SmokeConfig) -> Check:
    said = f"log-probabilities differ by at most {found.logprob_difference:.2g}"
    return check("log-probabilities", found.logprob_difference <= config.max_logprob_difference, said)


def template(asked: Sequence[list[int]], made: Sequence[list[int]]) -> Check:
    """asked: of the tokenizer's template, made: of the server's."""
    if not asked:
        return check("chat template", "not seen", "the tokenizer has none, or no prompt is a message")
    other = sum(a != b for a, b in zip(asked, made, strict=True))
    said = f"the server makes the tokenizer's tokens of {len(asked) - other} of {len(asked)} messages"
    return check("chat template", not other, said)


def _eos(answer: Greedy, stop: Sequence[int]) -> list[int]:
    return [token for token in answer.tokens[-1:] if token in stop]


def _is_empty(answer: Greedy, stop: Sequence[int]) -> bool:
    return not [token for token in answer.tokens if token not in stop]
