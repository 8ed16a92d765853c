"""Chat templates of real models, a tokenizer for each, and what their authors' formats say is learned."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Case:
    """`learned`: a regular expression over the text; its group is what is learned of each answer."""

    name: str
    learned: str
    special: tuple[str, ...]
    bos: str | None = None
    eos: str = ""
    system: bool = True
    tools: bool = False
    added: tuple[str, ...] = ()

    def source(self) -> str:
        return (TEMPLATES / f"{self.name}.jinja").read_text(encoding="utf-8")


CHATML = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)"
LLAMA3 = r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)"
_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_HEADERS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|eom_id|>",
)
_TURN = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_PHI = ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
_HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>")
_INST = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]")
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

CASES = [
    Case("llama2", r"\[/INST\](.*?</s>)", ("<s>", "</s>"), "<s>", "</s>"),
    Case("llama3", LLAMA3, _HEADERS, "<|begin_of_text|>", "<|eot_id|>"),
    Case("llama3_1", LLAMA3, _HEADERS, "<|begin_of_text|>", "<|eot_id|>", tools=True),
    Case("llama3_2", LLAMA3, _HEADERS, "<|begin_of_text|>", "<|eot_id|>", tools=True),
    Case("mistral_v1", r"\[/INST\](.*?</s>)", ("<s>", "</s>"), "<s>", "</s>", system=False),
    Case("mistral_nemo", r"\[/(?:INST|TOOL_RESULTS)\](.*?</s>)", _INST, "<s>", "</s>", system=False, tools=True),
    Case("qwen2_5", CHATML, _IM, None, "<|im_end|>", tools=True, added=("<tool_call>", "</tool_call>")),
    Case("qwen3", CHATML, _IM, None, "<|im_end|>", tools=True, added=_THINK),
    Case(
        "qwen3_training",
        r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)",
        _IM,
        None,
        "<|im_end|>",
        tools=True,
        added=_THINK,
    ),
    Case("gemma", r"<start_of_turn>model\n(.*?<end_of_turn>)", _TURN, "<bos>", "<eos>", system=False),
    Case("gemma3", r"<start_of_turn>model\n(.*?<end_of_turn>)", _TURN, "<bos>", "<eos>"),
    Case("chatml", CHATML, _IM, None, "<|im_end|>"),
    Case("zephyr", r"<\|assistant\|>\n(.*?</s>)", ("<s>", "</s>"), "<s>", "</s>"),
    Case("phi3", r"<\|assistant\|>\n(.*?<\|end\|>)", _PHI, "<s>", "<|endoftext|>"),
    Case("phi3_5", r"<\|assistant\|>\n(.*?<\|end\|>)", _PHI, "<s>", "<|endoftext|>"),
    Case("smollm2", CHATML, _IM, "<|im_start|>", "<|im_end|>"),
    Case("smollm3", CHATML, _IM, None, "<|im_end|>", added=_THINK),
    Case("deepseek_v2", r"Assistant:( .*?<｜end▁of▁sentence｜>)", _DEEPSEEK, *_DEEPSEEK),
    Case(
        "gptoss",
        r"<\|start\|>assistant((?:<\|channel\|>final| to=functions).*?(?:<\|end\|>|<\|return\|>|<\|call\|>))",
        _HARMONY,
        None,
        "<|return|>",
        tools=True,
    ),
]


def oracle(case: Case, text: str) -> list[tuple[int, int]]:
    return [match.span(1) for match in re.finditer(case.learned, text, re.DOTALL)]


@cache
def tokenizer_of(case: Case):
    """Byte-level, so that any text is tokens; with the model's own special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*alphabet, "Ġt", "he", "an", "Ġthe"])}
    raw = Tokenizer(models.BPE(vocab=words, merges=[("Ġ", "t"), ("h", "e"), ("a", "n"), ("Ġt", "he")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in case.special])
    raw.add_tokens([AddedToken(token, special=False, normalized=False) for token in case.added])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=case.eos, bos_token=case.bos)
    made.chat_template = case.source()
    return made


def marked(text: str, spans) -> str:
    """The text with what is learned between ⟦ and ⟧."""
    for begin, end in sorted(spans, reverse=True):
        text = f"{text[:begin]}⟦{text[begin:end]}⟧{text[end:]}"
    return text


TURNS = [
    ("user", "What is 2+2?"),
    ("assistant", "4"),
    ("user", "And the capital of France?"),
    ("assistant", "It is Paris."),
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def conversation(case: Case):
    turns = [("system", "Be brief."), *TURNS] if case.system else TURNS
    return [{"role": role, "content": content} for role, content in turns]


def tool_conversation(case: Case):
    call = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    return {
        "tools": [WEATHER],
        "messages": [
            {"role": "user", "content": "Weather in Paris?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "18 degrees", "name": "weather", "tool_call_id": "call00001"},
            {"role": "assistant", "content": "It is 18 degrees."},
        ],
    }
