"""LoRA (Hu et al. 2021) by PEFT, in the model's own classes: adapters put in, merged again, and kept beside."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from controlllm.config import LoRAConfig
from controlllm.control.expand import decoder_layers
from controlllm.control.model import number_of_layers

ADAPTER = "default"


def add_adapters(model: Any, lora: LoRAConfig, *, seed: int) -> None:
    """Give linear layers of the blocks a trainable B·A beside the frozen weight, in place.

    The model starts as the base: B is zero. A depends on the seed and the model's shape only. ValueError for a layer
    that the blocks do not have.
    """
    from peft import LoraConfig, inject_adapter_in_model

    number_of_layers(model)
    names = _targets(_linear_layers(model), lora.target_modules)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type] - any number scales
        lora_dropout=lora.dropout,
        target_modules=names,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in _linear_layers(model).values()),
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        start = torch.empty(down.weight.shape, dtype=torch.float32, device="cpu")
        down.weight = nn.Parameter(nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator))
        up.weight = nn.Parameter(torch.zeros(up.weight.shape, dtype=torch.float32, device="cpu"))


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by name, bottom to top."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def merge_adapters(model: Any) -> None:
    """W + alpha / rank · B·A in W's dtype (load in float32), and PEFT's layers replaced by the plain ones, in place."""
    for name, layer in adapted_layers(model).items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def save_adapter(model: Any, folder: Path, *, base_name: str) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.from_pretrained(base, folder)` reads them.

    base_name: of the base model, for whoever finds the adapter alone.
    """
    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path, config.inference_mode = base_name, True
    folder.mkdir()
    config.save_pretrained(folder)
    adapter = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if f".{ADAPTER}." in name
    }
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _linear_layers(model: Any) -> dict[str, nn.Module]:
    """Linear layers of the blocks by their name in the model."""
    blocks = decoder_layers(model.base_model)
    inside = {id(module) for block in blocks for module in block.modules()}
    kinds = (nn.Linear, Conv1D)
    return {name: m for name, m in model.named_modules() if id(m) in inside and isinstance(m, kinds)}


def _targets(layers: dict[str, nn.Module], wanted: list[str] | str) -> list[str]:
    existing = sorted({name.rpartition(".")[2] for name in layers})
    if wanted == "all-linear":
        return existing
    for name in wanted:
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            raise ValueError(
                f"lora.target_modules: the blocks have no linear layer {name}; they have {', '.join(existing)}"
            )
    return list(wanted)
