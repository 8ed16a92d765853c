"""Packed rows against padded batches: targets per second, forward and backward, of the same documents and model.

python bench/packed_padded.py [documents of a micro-batch] [rounds]

Documents are as long as chats (lognormal, 200 tokens on average, at most the context of 2048), the second half of each
is learned. Padded is what transformers' collators make: as long as the longest, with an attention mask, sdpa; packed is
this trainer's. Both run the same expanded model, in turn.
"""

import statistics
import sys
import time

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from controlllm.control.loss import IGNORED, forward_with_loss
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.data.loader import collate
from controlllm.train import attention

MEAN, SPREAD, CONTEXT, VOCABULARY = 200, 0.8, 2048, 8192


def main(documents: int = 16, rounds: int = 3) -> None:
    attention.register()
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=6, max_position_embeddings=CONTEXT, **sizes)
    )
    model = expand_model(model, ControlSettings(sites=[2, 5], divergence="mse")).train()
    kernels = {"packed": "packed", "padded": "sdpa"}
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"packed": [], "padded": []}
    targets, tokens, losses = 0, {"packed": 0, "padded": 0}, {}
    step(model, "packed", packed(chats(4, rng)))  # what is made once
    for number in range(rounds):
        texts = chats(documents, rng)
        sides = {"packed": packed(texts), "padded": padded(texts)}
        targets += int((sides["packed"]["labels"] != IGNORED).sum())
        for name in sorted(sides, reverse=number % 2 == 1):
            seconds_taken, losses[name] = step(model, kernels[name], sides[name])
            seconds[name].append(seconds_taken)
            tokens[name] += sides[name]["input_ids"].numel()
        apart = abs(losses["packed"] - losses["padded"]) / losses["padded"]
        assert apart < 1e-5, f"the losses differ by {apart:.1e}"
    rates = {name: targets / sum(taken) for name, taken in seconds.items()}
    print(f"{rounds} micro-batches of {documents} chats, {targets} targets, {torch.get_num_threads()} threads, float32")
    for name, rate in rates.items():
        print(f"{name}: {tokens[name]} tokens computed, {rate:,.0f} targets/s")
    each = [b / a for a, b in zip(seconds["packed"], seconds["padded"], strict=True)]
    print(f"ratio {rates['packed'] / rates['padded']:.2f} (by micro-batch: median {statistics.median(each):.2f})")


def chats(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    lengths = rng.lognormal(np.log(MEAN) - SPREAD**2 / 2, SPREAD, count).clip(8, CONTEXT).astype(int)
    return [rng.integers(0, VOCABULARY, length) for length in lengths]


def packed(texts: list[np.ndarray]) -> dict[str, Tensor]:
    target = [np.arange(len(text)) >= len(text) // 2 for text in texts]
    lengths = np.array([len(text) for text in texts])
    row = {"input_ids": np.concatenate(texts), "lengths": lengths, "target": np.concatenate(target)}
    return collate([row]).arguments()


def padded(texts: list[np.ndarray]) -> dict[str, Tensor]:
    width = max(map(len, texts))
    ids, labels, mask = torch.zeros(3, len(texts), width, dtype=torch.long)
    labels.fill_(IGNORED)
    for row, text in enumerate(texts):
        end, half = len(text), len(text) // 2
        ids[row, :end], mask[row, :end] = torch.from_numpy(text), 1
        labels[row, half:end] = ids[row, half:end]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def step(model: LlamaForCausalLM, kernel: str, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Seconds and loss of one forward and backward pass."""
    model.set_attn_implementation(kernel)
    model.zero_grad()
    began = time.perf_counter()
    loss = forward_with_loss(model, **batch, use_cache=False).loss
    assert loss is not None
    loss.backward()
    return time.perf_counter() - began, loss.item()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
