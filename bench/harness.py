"""Shared question tokens against lm-evaluation-harness's own scoring: the same answers, and the ratio of times.

python bench/harness.py MODEL_DIRECTORY [questions]
"""

import sys
import time

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import controlllm  # noqa: F401 - expanded checkpoints, too
from controlllm.benchmark.harness import TokenLM
from controlllm.benchmark.hf_engine import HFEngine
from controlllm.data.probes import PROBES
from controlllm.data.sources import read_rows


def main(directory: str, questions: int = 24) -> None:
    probe = PROBES["mmlu-dev"]
    items = [item for row in read_rows(probe.source) for item in probe.items(row)][:questions]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ours = TokenLM(HFEngine(model, tokenizer, 16), tokenizer, model.config, lambda done, note="": None)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    pairs = [(item["prompt"], f" {choice}") for item in items for choice in item["choices"]]
    requests = [(pair, *ours._encode_pair(*pair)) for pair in pairs]
    seconds, answers = {}, {}
    for name, lm in (("shared", ours), ("harness", theirs)):
        began = time.perf_counter()
        answers[name] = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        seconds[name] = time.perf_counter() - began
    apart = max(abs(a - b) for (a, _), (b, _) in zip(answers["shared"], answers["harness"], strict=True))
    print(f"{len(items)} questions with 4 answers each, bfloat16")
    ratio = seconds["harness"] / seconds["shared"]
    print(f"harness {seconds['harness']:.1f} s, shared {seconds['shared']:.1f} s, ratio {ratio:.2f}")
    print(f"log-likelihoods differ by at most {apart:.2f}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
