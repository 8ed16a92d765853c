"""A random Llama, random packed rows and the trainer over both: what the trainer's benches have in common."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from controlllm.config import FSDP, Method, MixConfig, ModelConfig, PackConfig, TrainConfig
from controlllm.data.loader import Mix
from controlllm.train import attention
from controlllm.train.checkpoint import Checkpoints
from controlllm.train.curves import RunFacts
from controlllm.train.distributed import World
from controlllm.train.model import load_model, prepare, storage_dtype
from controlllm.train.native import Trainer
from controlllm.train.parallel import parallelize
from controlllm.train.weights import empty_model, fill

SIZES = ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocabulary", "tokens")
NEVER = {"every": 1_000_000}
"""Checkpoints: none while something is measured."""


def add_sizes(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Options for the sizes of a Llama and the tokens of a packed row."""
    for name in SIZES:
        default = defaults[name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")


def llama_config(options: argparse.Namespace) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.intermediate, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, num_key_value_heads=options.kv_heads, vocab_size=options.vocabulary,
        max_position_embeddings=options.tokens, tie_word_embeddings=False,
    )  # fmt: skip


def random_model(options: argparse.Namespace, model: ModelConfig, method: Method, device: torch.device) -> Any:
    """As the training stage prepares it, made where it is trained, in the types in which weights are stored."""
    from transformers import LlamaForCausalLM

    attention.register()
    config = llama_config(options)
    config._attn_implementation = model.attention
    usual = torch.get_default_dtype()
    torch.set_default_dtype(storage_dtype(model, method))
    try:
        with device:
            return prepare(LlamaForCausalLM(config), method, seed=0)
    finally:
        torch.set_default_dtype(usual)


def stored_model(base: Path, model: ModelConfig, method: Method, world: World, config: TrainConfig) -> tuple[Any, Any]:
    """A saved base as the training stage loads it, and what reads the weights of one that is sharded first."""
    if not isinstance(config.parallel, FSDP):
        return load_model(base, model, method), None
    return empty_model(base, model, method), lambda made: fill(made, base, device=world.device, world=world)


def trainer_of(model: Any, mix: Mix, config: TrainConfig, method: Method, *, world: World, folder: Path,
               fill: Any = None) -> Trainer:  # fmt: skip
    parallel = parallelize(model, world, config, fill=fill)
    folder.mkdir(parents=True, exist_ok=True)
    saved = Checkpoints(folder / "checkpoints", config.checkpoint, world=world, identity={})
    run = RunFacts(name="bench", key="bench", settings={})
    return Trainer(parallel, mix, config, folder=folder, checkpoints=saved, run=run, control=method.control)


class RandomRows:
    """A shelf of rows of `tokens` tokens each, documents about `document` long, of which the second half is learned.

    With document 0, one document fills a row and all of it is learned.
    """

    units, name = 1, "random"

    def __init__(self, rows: int, tokens: int, *, vocabulary: int, document: int = 0):
        rng = np.random.default_rng(0)
        self.tokens = tokens
        self.rows = [self._row(tokens, vocabulary, document, rng) for _ in range(rows)]

    @staticmethod
    def _row(tokens: int, vocabulary: int, document: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        edges = [0, tokens]
        while document and edges[-2] + 8 < tokens:
            edges.insert(-1, min(tokens, edges[-2] + int(rng.integers(document // 2, document * 3 // 2))))
        lengths = np.diff(np.unique(edges))
        learned = [np.arange(length) >= (length // 2 if document else 0) for length in lengths]
        ids = rng.integers(0, vocabulary, tokens)
        return {"input_ids": ids, "lengths": lengths, "target": np.concatenate(learned)}

    def rows_of(self, unit: int, kind: str = "train") -> int:
        return len(self.rows)

    def read(self, unit: int, row: int, kind: str = "train") -> Any:
        return self.rows[row]

    def tokens_per_row(self) -> float:
        return self.tokens

    def mix(self) -> Mix:
        """In the order they stand."""
        shelf: Any = self
        return Mix(
            [shelf], MixConfig.model_validate({"datasets": [{"name": self.name}], "order": "source"}), PackConfig()
        )
