"""What virtual tokens are before any training: as PEFT starts them, but from our seed."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from controlllm.config import PromptConfig
from controlllm.errors import UserError
from controlllm.train.prompt import prefix_shape


def embeddings_at_start(model: Any, prompt: PromptConfig, *, seed: int) -> Tensor:
    """(tokens, hidden) float32: of `init_text`, repeated or cut, or of tokens drawn from the vocabulary."""
    count, embedding = prompt.num_virtual_tokens, model.get_input_embeddings()
    if prompt.init_text is None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(embedding.num_embeddings, (count,), generator=generator)
    else:
        text = _tokens(model, prompt.init_text)
        ids = torch.tensor(text).repeat(-(-count // len(text)))[:count]
    with torch.no_grad():
        rows = _stored_rows(model, ids) if embedding.weight.is_meta else embedding.weight[ids]
        bare = copy.copy(embedding)  # its own forward pass: some families scale their embeddings
        bare.padding_idx = None
        return functional_call(bare, {"weight": rows}, (torch.arange(count),)).float()


def states_at_start(model: Any, prompt: PromptConfig, *, seed: int) -> Tensor:
    """(tokens, layers · 2 · key heads · head_dim) float32, normally distributed; ValueError where it has no such
    attention."""
    layers, heads, size = prefix_shape(model.config)
    if name := next((n for n in ("kv_lora_rank", "num_kv_shared_layers") if getattr(model.config, n, None)), None):
        raise ValueError(
            f"prompt.kind prefix: {model.config.model_type} has {name}, so its layers do not each keep keys and values "
            "that a prefix could stand before; set prompt.kind to prompt"
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prompt.num_virtual_tokens, layers * 2 * heads * size, generator=generator)


def _tokens(model: Any, text: str) -> list[int]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model.name_or_path)(text)["input_ids"]
    if not ids:
        raise UserError("prompt.init_text: the base's tokenizer makes no token of it; leave it out")
    return ids


def _stored_rows(model: Any, ids: Tensor) -> Tensor:
    """Rows of the embedding matrix that is not loaded yet, as it will be."""
    from controlllm.train.weight_files import Converted, find_tensors, opened, read_range

    base, weight = Path(model.name_or_path), model.get_input_embeddings().weight
    try:
        stored = find_tensors(model, base)
    except Converted:
        return _loaded_rows(base, ids, weight.dtype)
    state = model.state_dict(keep_vars=True)
    place = next(stored[name] for name, tensor in state.items() if tensor is weight and name in stored)
    with opened(place.file) as handle:
        rows = [read_range(handle, place.key, (slice(i, i + 1),)) for i in ids.tolist()]
    return torch.cat(rows).to(weight.dtype)


def _loaded_rows(base: Path, ids: Tensor, dtype: torch.dtype) -> Tensor:
    from transformers import AutoModelForCausalLM

    whole: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return whole.get_input_embeddings().weight[ids]
