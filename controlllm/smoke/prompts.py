"""What both engines are asked: prompts of the project's own, and those of a recipe's probes, as tokens."""

import json
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

OWN = Path(__file__).parent / "prompts.txt"
"""256 of them, one per line: chat, code, maths and other languages in turn."""


@dataclass(frozen=True)
class Prompt:
    """Tokens, and what they were made of."""

    text: str
    tokens: list[int]
    message: bool
    """Whether `text` is a user's message, and not a prompt that was rendered before."""


def choose(tokenizer: Any, data: Path | None, *, count: int, longest: int | None) -> list[Prompt]:
    """`count` prompts (fewer where there are no more). longest: leaves out those with more tokens.

    data: of the stage "ingest data", whose probes' prompts are asked, too.
    """
    own = [_message(tokenizer, text) for text in own_prompts()[:count]]
    probes = [_rendered(tokenizer, text) for text in probe_prompts(data, count)] if data else []
    both = [prompt for prompt in chain(*zip_longest(own, probes)) if prompt and prompt.tokens]
    return [prompt for prompt in both if longest is None or len(prompt.tokens) <= longest][:count]


def own_prompts() -> list[str]:
    return OWN.read_text(encoding="utf-8").splitlines()


def probe_prompts(data: Path, count: int) -> list[str]:
    """The first prompts of each probe, in turn; they are rendered already."""
    files = sorted((data / "probes").glob("*.jsonl"))
    rows = [[json.loads(line) for line in file.read_text().splitlines()[:count]] for file in files]
    return [row["prompt"] for turn in zip_longest(*rows) for row in turn if row and "prompt" in row][:count]


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _message(tokenizer: Any, text: str) -> Prompt:
    if not has_template(tokenizer):
        return Prompt(text, tokenizer(text)["input_ids"], message=False)
    asked = [{"role": "user", "content": text}]
    tokens = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    return Prompt(text, tokens, message=True)


def _rendered(tokenizer: Any, text: str) -> Prompt:
    return Prompt(text, tokenizer(text, add_special_tokens=False)["input_ids"], message=False)
