"""Tiny real things: a four-layer Llama with a tokenizer of its own, and a recipe that runs it in seconds."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests run at a time
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the commands do: threads that spin slow a busy machine

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

RECIPE = """
name: tiny
output: {output}
model: {{name: {model}}}
control: {{num_expanded: 2}}
mix: {{datasets: [{{name: puzzles, rows: 40, seed: 1, dedup: true}}]}}
pack: {{context_length: 256, validation_fraction: 0.1, overlong: drop}}
train: {{steps: 4, lr: 0.001, global_batch_size: 2, precision: float32, checkpoint: {{every: 2}}}}
validation: {{every: 2, rows: 1}}
benchmark: {{new: [puzzles], old: [chat, drift], items: 12, batch_size: 4, dtype: float32, backend: hf}}
smoke: null
"""


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level, so that any text is tokens; ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|im_start|>", "<|im_end|>", *alphabet]
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = TEMPLATE
    return made


def tiny_config(**changes):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2}
    ids = {"vocab_size": 258, "eos_token_id": 1, "pad_token_id": 1, "bos_token_id": None}
    return LlamaConfig(**(sizes | ids | {"num_key_value_heads": 1, "max_position_embeddings": 2048} | changes))


@pytest.fixture
def tiny_model():
    """A fresh random model, the same every time."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, tokenizer) -> Path:
    """A base model as a Hugging Face directory."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tiny_base, tmp_path) -> Path:
    """A whole run in seconds; results in the test's own folder."""
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE.format(model=tiny_base, output=tmp_path / "runs"))
    return file


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """A stage store of the test's own."""
    monkeypatch.setenv("CONTROLLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
