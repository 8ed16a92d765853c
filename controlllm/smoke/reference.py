"""What transformers writes: the greedy tokens that vLLM's are compared with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controlllm.progress import Advance
from controlllm.smoke.greedy import Greedy, Likely

ROWS = 32
"""Prompts in a batch: 256 prompts of 32 tokens each take minutes on two cores, and not an hour."""


def answers(model: Path, prompts: Sequence[list[int]], *, max_new_tokens: int, advance: Advance) -> list[Greedy]:
    """In float32, on all GPUs or the CPU; the model is gone afterwards. `advance` is told how many are answered."""
    import torch
    from transformers import AutoTokenizer

    from controlllm.benchmark.beginnings import in_batches
    from controlllm.tuned import load_tuned

    loaded = load_tuned(model, dtype="float32").eval()
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    found: dict[int, Greedy] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))  # vLLM's import has the other core; threads that wait for it spin
    try:
        for batch in in_batches(prompts, ROWS):
            made = _batch(loaded, tokenizer, [prompts[place] for place in batch], max_new_tokens)
            found |= dict(zip(batch, made, strict=True))
            advance(len(found))
    finally:
        torch.set_num_threads(threads)
        del loaded
        torch.cuda.empty_cache()  # vLLM takes its place
    return [found[place] for place in range(len(prompts))]


def _batch(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[Greedy]:
    from controlllm.benchmark.decode import decode, eos_of
    from controlllm.benchmark.engine import Prompt
    from controlllm.benchmark.hf_engine import shares_questions

    seen: list[list[Likely]] = [[] for _ in prompts]

    def look(rows: list[int], logits: Any) -> None:
        """logits: (rows, vocabulary)"""
        chances, tokens = logits.float().log_softmax(-1).topk(2)
        for row, some, of in zip(rows, chances.tolist(), tokens.tolist(), strict=True):
            seen[row].append(list(zip(of, some, strict=True)))

    asked = [Prompt(tokens, max_new_tokens) for tokens in prompts]
    decode(model, tokenizer, asked, shared=shares_questions(model.config), look=look)
    stop = eos_of(model, tokenizer)
    return [_greedy(likely, stop) for likely in seen]


def _greedy(likely: list[Likely], stop: set[int]) -> Greedy:
    tokens = [place[0][0] for place in likely]
    finish = "stop" if tokens[-1] in stop else "length"
    return Greedy(tokens, [place[0][1] for place in likely], likely, finish)
