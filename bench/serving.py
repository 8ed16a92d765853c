"""What twins cost while a model writes: decode tokens/s of the base, the expanded and the folded model in vLLM.

python bench/serving.py [rounds] [hidden size] [sequences at a time]

Random Llamas of 32 layers, E = 8, bfloat16, the head as large a part as an 8B model's. All three engines are alive,
each in its own process, with the same settings, and write in turn: what else the machine does meets them alike. What is
printed are the medians of the rounds' ratios. A token is written by reading every weight once, so that expanded / base
cannot be above base's bytes / expanded's; folded / base should be 1. All run eagerly.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from controlllm.vllm_engine import ENVIRONMENT, open_llm

LAYERS, SITES, HEAD = 32, 8, 64
NEW_TOKENS = 32
os.environ.update(ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})


def main(rounds: int = 9, hidden: int = 768, sequences: int = 4) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        size = _save(Path(scratch), hidden)
        engines = {name: _open(Path(scratch, name), sequences) for name in size}
        speeds = _measured(engines, rounds, sequences)
    print(f"hidden {hidden}, {LAYERS} layers, E = {SITES}, {sequences} sequences at a time, {rounds} rounds in turn")
    for name, found in speeds.items():
        ratio = statistics.median(one / base for one, base in zip(found, speeds["base"], strict=True))
        print(
            f"{name:9} {statistics.median(found):7.1f} tokens/s, {size[name] / 1e6:6.0f} MB; "
            f"{ratio:.3f} of base, by weights {size['base'] / size[name]:.3f}"
        )


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


def _open(folder: Path, sequences: int) -> Any:
    return open_llm(
        str(folder),
        dtype="bfloat16",
        longest=256,
        gpus=0,
        max_num_seqs=sequences,
        kv_cache_memory_bytes=1 << 28,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )


def _measured(engines: dict[str, Any], rounds: int, sequences: int) -> dict[str, list[float]]:
    """Tokens/s of each engine in each round; a first round is not counted."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [row + 1, row + 2]} for row in range(sequences)]
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        names = list(engines)
        for name in names[turn % 3 :] + names[: turn % 3]:
            began = time.perf_counter()
            engines[name].generate(prompts, sampling, use_tqdm=False)
            speeds[name].append(sequences * NEW_TOKENS / (time.perf_counter() - began))
    return {name: found[1:] for name, found in speeds.items()}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
