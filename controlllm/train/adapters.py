"""LoRA, rsLoRA, DoRA and IA3 by PEFT, in the model's own classes: adapters put in, merged again, and kept beside."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from controlllm.config import IA3Config, LoRAConfig
from controlllm.control.expand import decoder_layers
from controlllm.control.model import number_of_layers

ADAPTER = "default"
Adapter = LoRAConfig | IA3Config


def add_adapters(model: Any, adapter: Adapter, *, seed: int, blocks: Iterable[nn.Module] | None = None) -> None:
    """Give linear layers of `blocks` (by default all) low-rank adapters or learned factors, in place; they alone are
    trained.

    The model starts as the base: B is zero, factors are one. All depends on the seed and the model's shape only, but
    for DoRA's lengths: where weights are on the meta device, these are, too. ValueError for a layer that the blocks do
    not have.
    """
    from peft import inject_adapter_in_model

    number_of_layers(model)
    layers = _linear_layers(model, decoder_layers(model.base_model) if blocks is None else blocks)
    transposed = any(isinstance(module, Conv1D) for module in layers.values())
    inject_adapter_in_model(
        _peft_config(adapter, layers, everywhere=blocks is None, fan_in_fan_out=transposed),
        model,
        adapter_name=ADAPTER,
        low_cpu_mem_usage=True,  # values are ours
    )
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        if isinstance(adapter, LoRAConfig):
            _start_low_rank(layer, generator, dora=adapter.dora)
        else:
            layer.ia3_l[ADAPTER] = nn.Parameter(torch.ones(layer.ia3_l[ADAPTER].shape, device="cpu"))


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by name, bottom to top."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def has_factors(block: nn.Module) -> bool:
    """Whether a block has DoRA's lengths or IA3's factors, whose small changes bfloat16 would round away."""
    return any("ia3_l." in name or "lora_magnitude_vector." in name for name, _ in block.named_parameters())


def merge_adapters(model: Any) -> None:
    """Into the weights in their own dtype (load in float32), and PEFT's layers replaced by the plain ones, in place.

    For a weight that two layers share, give one its own before (`twins.own_weights`).
    """
    for name, layer in adapted_layers(model).items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def save_adapter(model: Any, folder: Path, *, base_name: str) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.from_pretrained(base, folder)` reads them.

    base_name: of the base model, for whoever finds the adapter alone.
    """
    from peft import get_peft_model_state_dict

    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path, config.inference_mode = base_name, True
    folder.mkdir()
    config.save_pretrained(folder)
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    adapter = {f"base_model.model.{name}": tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft_config(adapter: Adapter, layers: dict[str, nn.Module], *, everywhere: bool, fan_in_fan_out: bool) -> Any:
    """everywhere: names without the path say enough."""
    from peft import IA3Config as PeftIA3
    from peft import LoraConfig as PeftLora

    section = "lora" if isinstance(adapter, LoRAConfig) else "ia3"
    targets = _targets(layers, adapter.target_modules, f"{section}.target_modules", everywhere=everywhere)
    common = {"target_modules": targets, "task_type": "CAUSAL_LM", "fan_in_fan_out": fan_in_fan_out}
    if isinstance(adapter, IA3Config):
        inputs = _targets(layers, adapter.feedforward_modules, "ia3.feedforward_modules", everywhere=everywhere)
        return PeftIA3(feedforward_modules=inputs, **common)  # type: ignore[arg-type]
    return PeftLora(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type] - any number scales
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        **common,  # type: ignore[arg-type]
    )


def _start_low_rank(layer: Any, generator: torch.Generator, *, dora: bool) -> None:
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    start = torch.empty(down.weight.shape, dtype=torch.float32, device="cpu")
    down.weight = nn.Parameter(nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator))
    up.weight = nn.Parameter(torch.zeros(up.weight.shape, dtype=torch.float32, device="cpu"))
    if dora:
        from controlllm.train.dora import Dora, base_lengths  # takes seconds to import

        made = Dora(base_lengths(layer), fan_in_fan_out=layer.fan_in_fan_out)
        layer.lora_magnitude_vector[ADAPTER] = made


def _linear_layers(model: Any, blocks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Linear layers of the blocks by their name in the model."""
    inside = {id(module) for block in blocks for module in block.modules()}
    kinds = (nn.Linear, Conv1D)
    return {name: m for name, m in model.named_modules() if id(m) in inside and isinstance(m, kinds)}


def _targets(layers: dict[str, nn.Module], wanted: list[str] | str, key: str, *, everywhere: bool) -> list[str]:
    """Names as PEFT takes them; ValueError, which names `key`, for a layer that does not exist."""
    existing = sorted({name.rpartition(".")[2] for name in layers})
    names = existing if isinstance(wanted, str) else wanted
    found = {one: [layer for layer in layers if layer == one or layer.endswith(f".{one}")] for one in names}
    for name, those in found.items():
        if not those:
            raise ValueError(f"{key}: the blocks have no linear layer {name}; they have {', '.join(existing)}")
    return list(names) if everywhere else [layer for those in found.values() for layer in those]
