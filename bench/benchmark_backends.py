"""transformers against vLLM behind lm-evaluation-harness: the same requests to both, and the ratio of times.

python bench/benchmark_backends.py MODEL_DIRECTORY [requests] [dtype]

Written answers (chat, up to 128 tokens), choices after a question alone and after five worked examples, and prose.
The start of vLLM is given apart: it is paid once per model.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from controlllm.benchmark.lm import open_lm
from controlllm.config import BenchmarkConfig
from controlllm.data.probes import PROBES
from controlllm.data.sources import read_rows

Ask = Callable[[Any], list[Any]]


def main(directory: str, count: int = 32, dtype: str = "bfloat16") -> None:
    seconds: dict[str, dict[str, float]] = {}
    answers: dict[str, dict[str, list[Any]]] = {}
    for backend in ("hf", "vllm"):
        config = BenchmarkConfig(backend=backend, dtype=dtype)  # type: ignore[arg-type]
        began = time.perf_counter()
        with open_lm(Path(directory), config, backend, lambda done, note="": None) as lm:
            lm.loglikelihood([_instance("loglikelihood", "a", " b")])
            seconds[backend] = {"start": time.perf_counter() - began}
            answers[backend] = {}
            for name, ask in _asked(lm, count).items():
                began = time.perf_counter()
                answers[backend][name] = ask(lm)
                seconds[backend][name] = time.perf_counter() - began
    print(f"{count} requests of each sort, {dtype}; vLLM starts in {seconds['vllm']['start']:.1f} s")
    for name in answers["hf"]:
        hf, vllm = seconds["hf"][name], seconds["vllm"][name]
        alike = _alike(answers["hf"][name], answers["vllm"][name])
        print(f"{name:18} hf {hf:6.1f} s, vllm {vllm:6.1f} s, hf / vllm {hf / vllm:5.2f}; {alike}")


def _asked(lm: Any, count: int) -> dict[str, Ask]:
    chats = [lm.apply_chat_template(item["messages"]) for item in _items("puzzles", count)]
    texts = [item["text"] for item in _items("prose", count)]
    questions = _items("mmlu-dev", count + 5)
    shots = "".join(f"{item['prompt']} {item['choices'][item['answer']]}\n\n" for item in questions[:5])
    generated = [_instance("generate_until", chat, {"until": [], "max_gen_toks": 128}) for chat in chats]
    alone, after = (
        [
            _instance("loglikelihood", before + item["prompt"], f" {choice}")
            for item in questions[5:]
            for choice in item["choices"]
        ]
        for before in ("", shots)
    )
    letters = [_instance("loglikelihood", pair.args[0], f" {'ABCD'[i % 4]}") for i, pair in enumerate(after)]
    prose = [_instance("loglikelihood_rolling", text) for text in texts]
    return {
        "generate": lambda lm: lm.generate_until(generated),
        "choice": lambda lm: lm.loglikelihood(alone),
        "choice, 5 shots": lambda lm: lm.loglikelihood(after),
        "letters, 5 shots": lambda lm: lm.loglikelihood(letters),
        "text": lambda lm: lm.loglikelihood_rolling(prose),
    }


def _items(name: str, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in read_rows(PROBES[name].source):
        found += PROBES[name].items(row)
        if len(found) >= count:
            return found[:count]
    raise SystemExit(f"{name} has {len(found)} items only")


def _alike(one: list[Any], other: list[Any]) -> str:
    if isinstance(one[0], str):
        return f"{sum(a == b for a, b in zip(one, other, strict=True))} of {len(one)} texts are the same"
    chances = [[answer[0] if isinstance(answer, tuple) else answer for answer in answers] for answers in (one, other)]
    return f"log-likelihoods differ by at most {max(abs(a - b) for a, b in zip(*chances, strict=True)):.4f}"


def _instance(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]), *sys.argv[3:])
