"""Small checkpoints that vLLM can serve: heads of 32, a tokenizer of words, logits far apart."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings

WORDS = ["<eos>", "<user>", "<assistant>", *(f"w{i}" for i in range(125))]
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '> ' + message.content + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # logits far apart, and far from what the embedding alone would say
    "eos_token_id": 0,
    "bos_token_id": None,
}


def llama(*, tied: bool = True) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))


def qwen2() -> Any:
    """A family whose config lists a kind per layer; half of them attend to a window."""
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention"] * 2
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, layer_types=kinds))


def save(folder: Path, base: Any, *, sites: list[int], chat: bool = True, **settings: Any) -> Path:
    """A checkpoint whose twins differ from their blocks; without sites the base itself."""
    model = expand_model(base, ControlSettings(sites=sites, **settings)) if sites else base
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if sites and parameter.requires_grad and "alpha_logit" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("alpha_logit"):
                parameter.add_(0.7)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE if chat else None
    tokenizer.save_pretrained(folder)
    return folder
