"""The model that is trained: the base with twins, with adapters, with some blocks trainable, or wholly trainable."""

from pathlib import Path
from typing import Any

import torch

from controlllm.config import Method, ModelConfig
from controlllm.errors import UserError
from controlllm.train import attention


def load_model(base: Path, model: ModelConfig, method: Method, *, seed: int = 0) -> Any:
    """The base model as `method` trains it, in training mode and in CPU memory.

    What is trained is float32, what is frozen has `model.dtype`. seed: of new random values (LoRA's).
    Raises UserError when method and model do not fit, or the base lacks a tensor or has one too many.
    """
    if method.quantization:  # as it is read, so that the precise weights are never there together
        from controlllm.train.weights import empty_model, fill

        quantised = empty_model(base, model, method, seed=seed)
        fill(quantised, base, device="cpu")
        return quantised

    from transformers import AutoModelForCausalLM

    attention.register()
    both: Any = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=storage_dtype(model, method),
        attn_implementation=model.attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # to say it in our words
    )
    loaded, found = both
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise misshapen(base, name, stored, wanted)
    refuse_incomplete(base, missing=found["missing_keys"], extra=found["unexpected_keys"])
    return prepare(loaded, method, seed=seed)


def storage_dtype(model: ModelConfig, method: Method) -> torch.dtype:
    """What the base's weights are read in: where all are trained, no frozen copy needs less than float32."""
    return torch.float32 if method.trains_all else getattr(torch, model.dtype)


def prepare(loaded: Any, method: Method, *, seed: int) -> Any:
    """Expand, freeze and widen a plain model in place; its weights may be on the meta device."""
    assert not method.quantization or next(loaded.parameters()).is_meta, "load_model quantises while it reads"
    loaded.config.use_cache = False  # with a cache, attention leaks across the documents of a packed row
    try:
        _apply_method(loaded, method, seed=seed)
    except ValueError as error:
        raise UserError(str(error)) from None
    for parameter in loaded.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return loaded.train()


def _apply_method(loaded: Any, method: Method, *, seed: int) -> None:
    if method.control:
        from controlllm.train.twins import expand

        expand(loaded, method.control, method.lora or method.ia3, seed=seed)
    elif adapter := method.lora or method.ia3:
        from controlllm.train.adapters import add_adapters

        add_adapters(loaded, adapter, seed=seed)
    elif method.prompt:
        from controlllm.train.prompt import add_prompt

        add_prompt(loaded, method.prompt, seed=seed)
    elif method.partial:
        from controlllm.train.partial import train_blocks

        train_blocks(loaded, method.partial)
    else:
        loaded.requires_grad_(True)


def refuse_incomplete(place: Path, *, missing: set[str], extra: set[str]) -> None:
    """UserError where the base's files do not hold exactly the model's tensors."""
    for name in sorted(missing):
        raise UserError(f"{place}: tensor '{name}' is missing; its config.json describes a model that needs it")
    for name in sorted(extra):
        raise UserError(f"{place}: holds tensor '{name}', which the model of its config.json does not have")


def misshapen(place: Path, name: str, stored: Any, wanted: Any) -> UserError:
    return UserError(f"{place}: tensor '{name}' has shape {list(stored)}, its config.json describes {list(wanted)}")
