"""Conversations and tokenizers for tests of rendering, and the one comparison that they share."""

import re

import numpy as np
import pytest
from chat_templates import CASES, Case, tokenizer_of
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from controlllm.data.render import render
from controlllm.data.types import Documents
from controlllm.errors import UserError

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
with_tools = pytest.mark.parametrize("case", [case for case in CASES if case.tools], ids=lambda case: case.name)


def chat(*contents, roles=("user", "assistant", "user", "assistant")):
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def documents(*some):
    return Documents.of(some, np.arange(len(some)))


def learned(tokens, tokenizer):
    return tokenizer.decode([i for i, t in zip(tokens.input_ids, tokens.target, strict=True) if t])


def copy_of(case: Case, template=None, change=lambda raw: None):
    """A tokenizer of one's own to change."""
    original = tokenizer_of(case)
    raw = Tokenizer.from_str(original.backend_tokenizer.to_str())
    change(raw)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=case.eos, bos_token=case.bos)
    made.chat_template = original.chat_template if template is None else template
    return made


CHATML = next(case for case in CASES if case.name == "chatml")

LLAMA3 = next(case for case in CASES if case.name == "llama3_2")


def assert_same(renderer, tokenizer, *some, **options):
    """Many at a time gives what one at a time gives."""
    batch = renderer.encode(documents(*some))
    reasons = dict(batch.bad)
    place = {index: i for i, index in enumerate(batch.index.tolist())}
    assert sorted([*place, *reasons]) == list(range(len(some)))
    for i, document in enumerate(some):
        if i in reasons:
            with pytest.raises(UserError, match=f"^{re.escape(reasons[i])}$"):
                render(document, tokenizer, **options)
            continue
        want = render(document, tokenizer, **options)
        part = slice(batch.offsets[place[i]], batch.offsets[place[i] + 1])
        assert batch.ids[part].tolist() == want.input_ids
        assert batch.target[part].tolist() == want.target
    assert not renderer.notes
    return batch


def looped(turn, after=""):
    return "{% for m in messages %}" + turn + "{% endfor %}" + after
