"""A vLLM engine that takes batches as they come and sends each when its last request is done."""

import queue
from collections.abc import Callable
from typing import Any

from controlllm.benchmark.engine import Answer, Pair, Prompt
from controlllm.benchmark.workers import requests_of
from controlllm.vllm_engine import open_llm


def serve(
    inbox: "queue.Queue[dict[str, Any]]",
    send: Callable[..., None],
    *,
    model: str,
    dtype: str,
    longest: int,
    gpus: int,
    stop: list[int],
) -> None:
    """longest: tokens of a request with its answer. gpus: those that the engine spans, 0 on a CPU. stop: EOS tokens."""
    engine = open_llm(model, dtype=dtype, longest=longest, gpus=gpus).llm_engine
    open_batches: dict[int, tuple[dict[str, Any], dict[int, Any]]] = {}  # number → (line, outputs by place)
    while True:
        while not engine.has_unfinished_requests() or not inbox.empty():
            line = inbox.get()
            open_batches[line["batch"]] = line, {}
            for place, request in enumerate(requests_of(line)):
                tokens, parameters = _asked(request, stop)
                engine.add_request(f"{line['batch']}-{place}", {"prompt_token_ids": tokens}, parameters)
        for output in engine.step():
            if output.finished:
                batch, place = map(int, output.request_id.split("-"))
                line, outputs = open_batches[batch]
                outputs[place] = output
                requests = requests_of(line)
                if len(outputs) == len(requests):
                    send(line, [_answer(request, outputs[place], stop) for place, request in enumerate(requests)])
                    del open_batches[batch]


def _asked(request: Pair | Prompt, stop: list[int]) -> tuple[list[int], Any]:
    """Tokens and sampling parameters. The last token of a continuation is looked at, but never an input."""
    from vllm import SamplingParams

    if isinstance(request, Pair):
        tokens, last = [*request.context, *request.continuation[:-1]], request.continuation[-1]
        within = 0 if len(request.continuation) > 1 else None  # 0: of the prompt's own tokens; None leaves its cache on
        return tokens, SamplingParams(
            temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, logprob_token_ids=[last],
            prompt_logprobs=within,
        )  # fmt: skip
    return request.tokens, SamplingParams(
        temperature=request.temperature, top_p=request.top_p, top_k=request.top_k, seed=request.seed,
        max_tokens=request.max_new_tokens, stop=request.until, stop_token_ids=stop, ignore_eos=True,
        skip_special_tokens=False, spaces_between_special_tokens=False,
    )  # fmt: skip


def _answer(request: Pair | Prompt, output: Any, stop: list[int]) -> Answer | list[int]:
    made = list(output.outputs[0].token_ids)
    if isinstance(request, Prompt):
        return made[:-1] if made and made[-1] in stop else made
    *before, last = request.continuation
    chance, greedy = output.outputs[0].logprobs[0][last].logprob, made == [last]
    for token, seen in zip(before, (output.prompt_logprobs or [])[len(request.context) :], strict=True):
        chance, greedy = chance + seen[token].logprob, greedy and seen[token].rank == 1
    return chance, greedy
