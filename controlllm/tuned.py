"""A tuned model from its folder, with what is no part of a plain model put in."""

import json
from pathlib import Path
from typing import Any


def load_tuned(folder: Path | str, *, dtype: str | None = None) -> Any:
    """What `AutoModelForCausalLM.from_pretrained` gives, with the virtual tokens of `adapter/` before every document.

    dtype: by its name in torch, the folder's own when left out. UserError where the virtual tokens cannot be read.
    """
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    if has_virtual_tokens(folder):
        from controlllm.train.prompt_files import load_prompt

        load_prompt(loaded, Path(folder, "adapter"))
    return loaded


def has_virtual_tokens(folder: Path | str) -> bool:
    """Whether the folder's config.json says that the model was trained with some."""
    file = Path(folder, "config.json")
    return file.is_file() and bool(json.loads(file.read_text()).get("prompt"))
