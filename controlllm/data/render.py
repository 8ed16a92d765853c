"""From messages to token ids and the mask of what is learned: the assistant's turns and the EOS after each."""

from dataclasses import dataclass
from typing import Any

from controlllm.errors import UserError


@dataclass(frozen=True)
class Tokens:
    """One document: ids and, per token, whether it is a target; equal lengths."""

    input_ids: list[int]
    target: list[bool]


def render(document: list[dict[str, str]] | str, tokenizer: Any) -> Tokens:
    """Tokenise a conversation or a text. UserError when nothing in it can be learned.

    Assistant spans are found by prefix difference of the rendered template, so that a template needs no markers for
    them; the text is tokenised once, as a whole, and the spans are mapped to tokens by character offsets.
    """
    if isinstance(document, str):
        return _render_text(document, tokenizer)
    if not any(message["role"] == "assistant" and message["content"] for message in document):
        raise UserError("the conversation has no answer by the assistant: nothing to learn")
    text = chat_text(document, tokenizer)
    spans = [_answer_span(document, i, tokenizer) for i, m in enumerate(document) if m["role"] == "assistant"]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    target = [any(begin <= start < end for begin, end in spans) for start, _ in encoded["offset_mapping"]]
    return Tokens(encoded["input_ids"], target)


def chat_text(messages: list[dict[str, str]], tokenizer: Any, *, prompt: bool = False) -> str:
    """The conversation as the template writes it; with `prompt`, up to where the assistant's answer begins."""
    if tokenizer.chat_template is None:
        raise UserError("the model's tokenizer has no chat template; give it one or train on text")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def _answer_span(document: list[dict[str, str]], index: int, tokenizer: Any) -> tuple[int, int]:
    before = chat_text(document[:index], tokenizer, prompt=True)
    after = chat_text(document[: index + 1], tokenizer)
    if not after.startswith(before):
        raise UserError(
            "the chat template writes earlier turns differently once an answer follows; labels are not exact"
        )
    answer_end = after.find(document[index]["content"].strip(), len(before)) + len(document[index]["content"].strip())
    eos = after.find(tokenizer.eos_token, answer_end)
    if eos < 0:
        raise UserError(f"the chat template does not end an answer with the EOS token {tokenizer.eos_token!r}")
    return len(before), eos + len(tokenizer.eos_token)


def _render_text(text: str, tokenizer: Any) -> Tokens:
    if not text.strip():
        raise UserError("the text is empty: nothing to learn")
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Tokens(ids, [True] * len(ids))
