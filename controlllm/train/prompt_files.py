"""Virtual tokens as PEFT's adapter folder: adapter_config.json and adapter_model.safetensors."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from controlllm.errors import UserError
from controlllm.train.prompt import VirtualTokens, attach, prefix_shape

TENSOR = "prompt_embeddings"
KINDS = {"PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}


def save_prompt(virtual: VirtualTokens, model_config: Any, folder: Path, *, base_name: str) -> None:
    """As `PeftModel.from_pretrained(base, folder)` reads them. base_name: of the model they were trained for."""
    from peft import PrefixTuningConfig, PromptTuningConfig

    layers, heads, size = prefix_shape(model_config)
    prefix = virtual.kind == "prefix"
    make = PrefixTuningConfig if prefix else PromptTuningConfig
    config = make(
        task_type="CAUSAL_LM",
        num_virtual_tokens=virtual.count,
        num_transformer_submodules=1,
        num_layers=layers,
        num_attention_heads=heads if prefix else model_config.num_attention_heads,
        token_dim=heads * size if prefix else model_config.hidden_size,
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    folder.mkdir()
    config.save_pretrained(str(folder))
    tensors = {TENSOR: virtual.weight.detach().contiguous()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_prompt(model: Any, folder: Path) -> None:
    """Put a saved folder's virtual tokens before the documents of the model they were trained for; all is frozen."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        weight = load_file(folder / "adapter_model.safetensors", device=str(model.device))[TENSOR]
        kind = KINDS[config["peft_type"]]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: its virtual tokens cannot be read: {type(error).__name__}: {error}") from None
    attach(model.requires_grad_(False), VirtualTokens(kind, weight).requires_grad_(False))
