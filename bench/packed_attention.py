"""Packed attention against a masked row: the same gradients, and the ratio of times of one layer.

python bench/packed_attention.py [documents] [tokens of each]
"""

import statistics
import sys
import time

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

from controlllm.train import attention


def main(documents: int = 9, length: int = 110, repeats: int = 7) -> None:
    attention.register()
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = LlamaModel(LlamaConfig(vocab_size=512, num_hidden_layers=4, **sizes))
    tokens = documents * length
    batch = {
        "input_ids": torch.randint(0, 512, (1, tokens)),
        "position_ids": torch.arange(length).repeat(documents)[None],
        "cu_seq_lens_q": torch.arange(0, tokens + 1, length, dtype=torch.int32),
    }
    times: dict[str, list[float]] = {"packed": [], "sdpa": []}
    gradients: dict[str, torch.Tensor] = {}
    for _ in range(repeats):
        for name in times:
            model.set_attn_implementation(name)
            model.zero_grad()
            began = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(**batch, use_cache=False).last_hidden_state.float().pow(2).mean().backward()
            times[name].append(time.perf_counter() - began)
            gradients[name] = model.layers[0].self_attn.q_proj.weight.grad.clone()
    apart = (gradients["packed"] - gradients["sdpa"]).norm() / gradients["sdpa"].norm()
    packed, masked = (statistics.median(times[name]) for name in times)
    print(f"{documents} documents of {length} tokens, four layers of SmolLM2-135M's size, forward and backward")
    print(f"masked row {masked:.3f} s, packed {packed:.3f} s, ratio {masked / packed:.2f}")
    print(f"gradients differ by {apart:.1e}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
