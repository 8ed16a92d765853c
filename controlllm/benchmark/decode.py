"""Generation of a batch that shrinks: a row that has ended is computed no further."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from controlllm.benchmark.beginnings import common_start, has_virtual, run_start
from controlllm.benchmark.engine import Prompt

Look = Callable[[list[int], Tensor], None]


@torch.no_grad()
def decode(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, shared: bool, look: Look = lambda rows, logits: None
) -> list[list[int]]:
    """New tokens of each prompt, until its stop words, an EOS of the model (left out) or its number of tokens.

    shared: what all prompts begin with is run once, which is wrong for layers that look at a window.
    look: is shown the prompts that go on and the logits of their next tokens, (rows, vocabulary).
    """
    stop = eos_of(model, tokenizer)
    start = common_start([prompt.tokens for prompt in prompts]) if shared and not has_virtual(model) else 0
    cache = run_start(model, prompts[0].tokens[:start], len(prompts)) if start else None
    rest = [prompt.tokens[start:] for prompt in prompts]
    pad = [max(map(len, rest)) - len(tokens) for tokens in rest]
    ids = torch.tensor([[0] * p + tokens for p, tokens in zip(pad, rest, strict=True)], device=model.device)
    seen = [[1] * start + [0] * p + [1] * len(tokens) for p, tokens in zip(pad, rest, strict=True)]
    mask = torch.tensor(seen, device=model.device)  # (rows, all tokens so far)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
    chances = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    while rows:
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = out.past_key_values
        look(rows, out.logits[:, -1])
        chosen = _choose(out.logits[:, -1], [prompts[row] for row in rows], [chances[row] for row in rows])
        going = [
            place
            for place, (row, token) in enumerate(zip(rows, chosen, strict=True))
            if _goes_on(made[row], token, stop, prompts[row], tokenizer)
        ]
        if len(going) < len(rows):
            kept = torch.tensor(going, dtype=torch.long, device=mask.device)
            rows, chosen, mask = [rows[p] for p in going], [chosen[p] for p in going], mask[kept]
            if rows:
                cache.batch_select_indices(kept)
        ids = torch.tensor(chosen, dtype=torch.long, device=mask.device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = mask.sum(-1, keepdim=True) - 1
    return made


def eos_of(model: Any, tokenizer: Any) -> set[int]:
    """What ends a text: the EOS tokens of the model's files and the tokenizer's."""
    found = {tokenizer.eos_token_id}
    for named in (model.config.eos_token_id, getattr(model.generation_config, "eos_token_id", None)):
        found |= set(named if isinstance(named, list) else [named])
    return found - {None}


def _goes_on(made: list[int], token: int, stop: set[int], prompt: Prompt, tokenizer: Any) -> bool:
    """Put the token to what was made, unless it ends the text; whether more is wanted."""
    if token in stop:
        return False
    made.append(token)
    if len(made) >= prompt.max_new_tokens:
        return False
    # A stop word may lie across tokens, but not across more of them than it has bytes.
    tail = tokenizer.decode(made[-max((len(words.encode()) for words in prompt.until), default=0) - 1 :])
    return not any(words in tail for words in prompt.until)


def _choose(logits: Tensor, prompts: Sequence[Prompt], chances: Sequence[torch.Generator]) -> list[int]:
    """(rows, vocabulary) → a token per row; what is sampled depends on the row alone, not on its batch."""
    chosen = logits.argmax(-1).tolist()
    for place, (prompt, chance) in enumerate(zip(prompts, chances, strict=True)):
        if prompt.temperature > 0:
            chosen[place] = _sample(logits[place].float().cpu(), prompt, chance)
    return chosen


def _sample(logits: Tensor, prompt: Prompt, chance: torch.Generator) -> int:
    """The tokens of `top_k`, of them the most likely that make up `top_p` (Holtzman et al. 2020)."""
    likely, tokens = torch.softmax(logits / prompt.temperature, -1).sort(descending=True)
    likely, tokens = likely[: prompt.top_k or None], tokens[: prompt.top_k or None]
    before = likely.cumsum(-1) - likely
    likely = torch.where(before < prompt.top_p * likely.sum(), likely, 0.0)
    return int(tokens[torch.multinomial(likely, 1, generator=chance)])
