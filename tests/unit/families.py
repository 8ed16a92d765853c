"""The families of decoders, each tiny, from its config class; blocks, norms and heads differ."""

import torch
import transformers
from transformers import AutoModelForCausalLM

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 8},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2},
    "Phi3": {},
    "Olmo2": {},
    "SmolLM3": {},
    "Mixtral": {"num_local_experts": 3},
}
IDS = torch.randint(3, 99, (2, 17), generator=torch.Generator().manual_seed(1))


def tiny(family, attention="sdpa", **changes):
    """A random base model."""
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def perturb(model):
    """As if it had been trained."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()
