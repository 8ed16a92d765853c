"""A tuned model from its folder, with what is no part of a plain model put in."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from controlllm.errors import UserError


def load_tuned(folder: Path | str, *, dtype: str | None = None) -> Any:
    """What `AutoModelForCausalLM.from_pretrained` gives, with the virtual tokens of `adapter/` before every document.

    dtype: by its name in torch, the folder's own when left out. UserError where the virtual tokens cannot be read.
    """
    loaded = load_whole(folder, dtype=dtype)
    if has_virtual_tokens(folder):
        from controlllm.train.prompt_files import load_prompt

        load_prompt(loaded, Path(folder, "adapter"))
    return loaded


def load_whole(folder: Path | str, *, dtype: str | None = None, **more: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, but UserError for a tensor that is not there: it would be random."""
    from transformers import AutoModelForCausalLM

    both: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True, **more)
    loaded, found = both
    for name in sorted(found["missing_keys"]):
        raise UserError(f"{folder}: tensor '{name}' is missing; its config.json describes a model that needs it")
    return loaded


def has_virtual_tokens(folder: Path | str) -> bool:
    """Whether the folder's config.json says that the model was trained with some."""
    file = Path(folder, "config.json")
    return file.is_file() and bool(json.loads(file.read_text()).get("prompt"))


@contextmanager
def as_base(model: Any) -> Iterator[None]:
    """While inside, a model that holds its base (twins, copies, virtual tokens) computes what that does."""
    from controlllm.control.loss import base_only
    from controlllm.train.prompt import virtual_tokens_of, without_virtual_tokens

    with without_virtual_tokens(model) if virtual_tokens_of(model) else base_only(model):
        yield


def stop_tokens(folder: Path | str, tokenizer: Any) -> list[int]:
    """What ends a text: the EOS tokens of the model's files and the tokenizer's."""
    stop = {tokenizer.eos_token_id}
    for file in (Path(folder, "config.json"), Path(folder, "generation_config.json")):
        named = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        stop |= set(named if isinstance(named, list) else [named])
    return sorted(stop - {None})
