"""Everything that the server is asked, once it has loaded the model."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from controlllm.config import SmokeConfig
from controlllm.smoke import endpoint
from controlllm.smoke.greedy import Greedy
from controlllm.smoke.prompts import Prompt
from controlllm.smoke.server import GREEDY, NAME, Server, greedy_answers

LATENCIES = 5
"""Prompts whose first token is timed; the first of them warms up."""


@dataclass(frozen=True)
class Answered:
    greedy: list[Greedy]
    templates: list[list[int]]
    """Tokens that the server makes of the prompts that are messages."""
    endpoint: dict[str, Any] | None
    wrong: list[str]
    """Of the endpoint."""
    facts: dict[str, Any]
    """Engine, model class, speed and memory."""


def ask(server: Server, prompts: Sequence[Prompt], config: SmokeConfig, *, tokenizer: Any) -> Answered:
    latency = _first_token(server, prompts)
    began = time.perf_counter()
    greedy = greedy_answers(server.ask("/v1/completions", _completion(prompts, config)))
    seconds = time.perf_counter() - began
    templates = [_templated(server, prompt) for prompt in prompts if prompt.message]
    answer, wrong = None, []
    if config.endpoint:
        place = next((n for n, prompt in enumerate(prompts) if prompt.message), 0)
        text = tokenizer.decode(greedy[place].tokens, skip_special_tokens=True)
        answer, wrong = endpoint.ask(
            server, prompts[place], greedy[place], text=text, max_new_tokens=config.max_new_tokens
        )
    made = sum(len(answer.tokens) for answer in greedy)
    speed = {"tokens": made, "tokens_per_second": round(made / seconds, 2), "first_token_seconds": round(latency, 4)}
    return Answered(greedy, templates, answer, wrong, _facts(server) | speed)


def _completion(prompts: Sequence[Prompt], config: SmokeConfig) -> dict[str, Any]:
    """All at once. What ends an answer is left to the server, which is to know it from the checkpoint."""
    return GREEDY | {
        "model": NAME,
        "prompt": [prompt.tokens for prompt in prompts],
        "max_tokens": config.max_new_tokens,
        "logprobs": 2,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }


def _first_token(server: Server, prompts: Sequence[Prompt]) -> float:
    times = [
        server.first_token_seconds(prompt.tokens, salt=str(number))
        for number, prompt in enumerate([prompts[0], *prompts[: LATENCIES - 1]])
    ]
    return median(times[1:])


def _templated(server: Server, prompt: Prompt) -> list[int]:
    asked = [{"role": "user", "content": prompt.text}]
    return server.ask("/tokenize", {"model": NAME, "messages": asked, "add_generation_prompt": True})["tokens"]


def _facts(server: Server) -> dict[str, Any]:
    """Summed over the processes of the engine, where it has several."""
    each = server.ask("/collective_rpc", {"method": "controlllm_facts"})["results"]
    gpu = [one["gpu"] for one in each if one["gpu"] is not None]
    return {
        "engine": f"vllm {server.get('/version')['version']}",
        "model_class": each[0]["model_class"],
        "layers": each[0]["layers"],
        "memory": {
            "resident": sum(one["resident"] for one in each),
            "gpu": sum(gpu) if gpu else None,
            "kv_cache": sum(one["kv_cache"] for one in each),
            "kv_cache_tokens": each[0]["kv_cache_tokens"],
        },
    }
