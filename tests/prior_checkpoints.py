"""Checkpoints in the prior implementation's format, made from nothing of ours, and its formulas for one pair."""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

TOKENS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}
KEYS = {"llama": {"mlp_bias": False, "pretraining_tp": 1}, "qwen2": {"max_window_layers": 28}, "mistral": {}}


def prior_checkpoint(
    folder, *, method, family="llama", tied=False, dtype=torch.float32, shards=1, hidden_size=32, intermediate_size=48,
    layers=4, trained=(1, 3), **expansion,
):  # fmt: skip
    """Layout concat; every tensor is random and every twin is another than its block."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    sizes |= {"vocab_size": 61, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    sizes |= {"tie_word_embeddings": tied, "sliding_window": None}
    expansion = {
        "expand_type": "concat", "merge_method": method, "freezed_layers": sorted({*range(layers)} - {*trained}),
        "interpolation_factor": 0, "interpolation_loss_alpha": 1, "interpolation_loss_type": "mse",
    } | expansion  # fmt: skip
    more = {"rope_theta": 5e5, "torch_dtype": str(dtype).removeprefix("torch."), "use_cache": False}
    config = {"model_type": "causallmexpansion", "expansion": expansion} | sizes | KEYS[family] | more
    if family == "llama":
        del config["sliding_window"]
    base = AutoModelForCausalLM.from_config(CONFIGS[family](**sizes, rope_theta=5e5))
    tensors = {name: t + 0.1 * torch.randn_like(t) for name, t in base.state_dict().items()}
    if tied:
        del tensors["lm_head.weight"]
    for layer in trained:
        _make_pair(tensors, f"model.layers.{layer}.", expansion, hidden_size)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    _save({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, folder, shards)
    return folder


def _make_pair(tensors, layer, expansion, hidden):
    for name in [name for name in tensors if name.startswith(layer)]:
        tensor, rest = tensors.pop(name), name.removeprefix(layer)
        tensors[f"{layer}pretrained_layer.{rest}"] = tensor
        tensors[f"{layer}expanded_layer.{rest}"] = tensor + 0.05 * torch.randn_like(tensor)
    method = expansion["merge_method"]
    if method in ("lerp", "slerp", "proj", "prog") and expansion["interpolation_factor"] is not None:
        tensors[f"{layer}interpolation_factor"] = torch.tensor([0.4])
    if method in ("dlerp", "dlerpin"):
        tensors[f"{layer}interp_weight.fc.weight"] = 0.3 * torch.randn(1, hidden * (1 + (method == "dlerp")))
        tensors[f"{layer}interp_weight.fc.bias"] = torch.tensor([0.4])
    if method == "moe":
        tensors[f"{layer}gating.gate_network.0.weight"] = 0.3 * torch.randn(2, hidden)
        tensors[f"{layer}gating.gate_network.0.bias"] = torch.tensor([0.1, -0.1])
    if method in ("proj", "prog"):
        name = {"proj": "linear_proj", "prog": "lateral_connection"}[method]
        tensors[f"{layer}{name}.weight"] = torch.eye(hidden) + 0.05 * torch.randn(hidden, hidden)
    if expansion.get("interpolation_norm_alpha") == -1:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}expanded_layer.{norm}.interpolation_factor"] = torch.tensor([0.8])


def _save(tensors, folder, shards):
    if shards == 1:
        return save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    files = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].numel()):
        fullest = min(range(shards), key=lambda i: sum(t.numel() for t in files.get(i, {}).values()))
        files.setdefault(fullest, {})[name] = tensor
    places = {}
    for index, part in files.items():
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def weight(expansion, own, f, e, x):
    """Of the twin's output."""
    method = expansion["merge_method"]
    if expansion["interpolation_factor"] is None:
        return torch.ones(1)
    if method in ("dlerp", "dlerpin"):
        seen = torch.cat([f, e], -1) if method == "dlerp" else x
        return torch.sigmoid(seen @ own["interp_weight.fc.weight"].T + own["interp_weight.fc.bias"])
    if method == "moe":
        scores = x @ own["gating.gate_network.0.weight"].T + own["gating.gate_network.0.bias"]
        return (scores[..., 1:] > scores[..., :1]).float()
    return torch.sigmoid(own["interpolation_factor"])


def _slerp(_own, f, e, w):
    cosine = F.cosine_similarity(f, e, dim=-1).unsqueeze(-1)
    theta, sine = torch.acos(cosine), torch.sqrt(1 - cosine**2 + 1e-8)
    return torch.sin((1 - w) * theta) / sine * f + torch.sin(w * theta) / sine * e


BLEND = {
    "lerp": lambda _own, f, e, w: (1 - w) * f + w * e,
    "slerp": _slerp,
    "prog": lambda own, f, e, w: (1 - w) * (f @ own["lateral_connection.weight"].T) + w * e,
}


def distance(expansion, own, f, e, w):
    """Mean over the tokens; of proj with the mapped output, of moe where the twin was chosen."""
    method, kind, alpha = (
        expansion[k] for k in ("merge_method", "interpolation_loss_type", "interpolation_loss_alpha")
    )
    teacher = f @ own["linear_proj.weight"].T if method == "proj" else f
    if kind == "mse":
        per_token = (teacher - e).pow(2).mean(-1)
    else:
        apart = F.relu(1 - F.cosine_similarity(teacher, e, dim=-1))
        per_token = F.smooth_l1_loss(apart, torch.zeros_like(apart), reduction="none") * (0.5 if kind == "dot" else 1)
    if method == "moe" or alpha == -1:
        per_token = per_token * w.squeeze(-1)
    return per_token.mean() * abs(alpha)
