"""What twins cost while a model writes: decode tokens/s of the base, the expanded and the folded model in vLLM.

python bench/serving.py [rounds] [hidden size] [sequences at a time]

Random Llamas of 32 layers, E = 8, bfloat16, the head as large a part as an 8B model's. All three engines are alive,
each in its own processes, with the same settings, and write in short turns, so that what else the machine does meets
them alike. Printed are the medians of the rounds' ratios: of tokens/s, and of tokens per second of CPU in the engine's
processes, which says more where the machine is busy. A token is written by reading every weight once, so that
expanded / base cannot be above base's bytes / expanded's; folded / base should be 1. All run eagerly.
"""

import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from controlllm.vllm_engine import ENVIRONMENT, open_llm

LAYERS, SITES, HEAD = 32, 8, 64
NEW_TOKENS = 16
os.environ.update(ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})


Speed = tuple[float, float]
"""Tokens per second, and per second of CPU."""


@dataclass(frozen=True)
class Engine:
    llm: Any
    processes: list[psutil.Process]

    def cpu_seconds(self) -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in self.processes))


def main(rounds: int = 25, hidden: int = 768, sequences: int = 4) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        size = _save(Path(scratch), hidden)
        engines = {name: _open(Path(scratch, name), sequences) for name in size}
        try:
            speeds = _measured(engines, rounds, sequences)
        finally:
            for engine in engines.values():
                engine.llm.llm_engine.engine_core.shutdown()
    print(f"hidden {hidden}, {LAYERS} layers, E = {SITES}, {sequences} sequences at a time, {rounds} rounds in turn")
    for name in size:
        wall, cpu = (_ratio(speeds[name], speeds["base"], which) for which in (0, 1))
        speed = statistics.median(found[0] for found in speeds[name])
        limit = size["base"] / size[name]
        print(f"{name:9} {speed:7.1f} tokens/s; of base: {wall:.3f}, by CPU time {cpu:.3f}, by weights {limit:.3f}")


def _ratio(found: list[Speed], base: list[Speed], which: int) -> float:
    return statistics.median(one[which] / other[which] for one, other in zip(found, base, strict=True))


def _save(folder: Path, hidden: int) -> dict[str, int]:
    """The three checkpoints; bytes that a token reads of each."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from controlllm.control.expand import freeze
    from controlllm.control.fold import fold_model
    from controlllm.control.model import expand_model
    from controlllm.control.settings import ControlSettings

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=LAYERS, head_dim=HEAD,
        num_attention_heads=hidden // HEAD, num_key_value_heads=max(1, hidden // HEAD // 4),
        vocab_size=32 * hidden, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(config).bfloat16()
    sizes = {"base": _saved(base, folder / "base")}
    sites = list(range(LAYERS // SITES - 1, LAYERS, LAYERS // SITES))
    expanded = expand_model(base, ControlSettings(sites=sites))
    freeze(expanded)
    with torch.no_grad():
        for parameter in expanded.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    sizes["expanded"] = _saved(expanded, folder / "expanded")
    sizes["folded"] = _saved(fold_model(expanded, dict.fromkeys(sites, 0.5)), folder / "folded")
    return sizes


def _saved(model: Any, folder: Path) -> int:
    model.save_pretrained(folder)
    read = [parameter for name, parameter in model.named_parameters() if "embed_tokens" not in name]
    return sum(parameter.numel() * parameter.element_size() for parameter in read)


def _open(folder: Path, sequences: int) -> Engine:
    before = set(psutil.Process().children(recursive=True))
    llm = open_llm(
        str(folder),
        dtype="bfloat16",
        longest=256,
        gpus=0,
        max_num_seqs=sequences,
        kv_cache_memory_bytes=1 << 28,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    return Engine(llm, sorted(set(psutil.Process().children(recursive=True)) - before, key=lambda one: one.pid))


def _measured(engines: dict[str, Engine], rounds: int, sequences: int) -> dict[str, list[Speed]]:
    """Speeds of each engine in each round; a first round is not counted."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [row + 1, row + 2]} for row in range(sequences)]
    speeds: dict[str, list[Speed]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        names = list(engines)
        for name in names[turn % 3 :] + names[: turn % 3]:
            engine = engines[name]
            began, cpu = time.perf_counter(), engine.cpu_seconds()
            engine.llm.generate(prompts, sampling, use_tqdm=False)
            spent, cpu = time.perf_counter() - began, engine.cpu_seconds() - cpu
            speeds[name].append((sequences * NEW_TOKENS / spent, sequences * NEW_TOKENS / cpu))
    return {name: found[1:] for name, found in speeds.items()}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
