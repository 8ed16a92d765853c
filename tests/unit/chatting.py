"""Tiny models that talk, and what a chat is made of."""

import torch
from conftest import tiny_config
from transformers import LlamaForCausalLM

from controlllm.chat.conversation import Conversation, Writer
from controlllm.chat.engine import Request
from controlllm.chat.local import LocalEngine
from controlllm.chat.session import Session
from controlllm.chat.settings import Sampling
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings

STOP = frozenset({1})
"""The end of a turn of the tests' tokenizer."""


def talker(**changes):
    """A random Llama that says something else at each place."""
    torch.manual_seed(3)
    return LlamaForCausalLM(tiny_config(initializer_range=0.3, **changes)).eval()


def tuned_talker(**settings):
    """The same with twins, as if they had been trained."""
    model = expand_model(talker(), ControlSettings(sites=[1, 3], **settings))
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def request(ids, room=24, **changes):
    sampling = Sampling(temperature=changes.pop("temperature", 0.0), top_p=changes.pop("top_p", 1.0))
    return Request(list(ids), room, sampling, **{"seed": 0, "stop": STOP} | changes)


def tokens(answer):
    return [token for token in answer if token is not None]


def generated(model, ids, room=24):
    """What transformers itself gives, greedily."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = sorted(STOP), 1
    row = torch.tensor([ids])
    made = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=room, do_sample=False)
    ids = made[0, len(ids) :].tolist()
    return ids[: ids.index(1)] if 1 in ids else ids


def session(model, tokenizer, *, system=None, **sampling):
    """A chat with a model in this process."""
    sampling = Sampling(**{"max_new_tokens": 12} | sampling)
    return Session(LocalEngine(model), Conversation(Writer(tokenizer), system), sampling, STOP)


def said(chat, message):
    """One turn; the answers by name."""
    replies = chat.ask(message)
    for reply in replies:
        assert "".join(reply.pieces()) == reply.text
    chat.keep(message, replies)
    return {reply.name: reply.text for reply in replies}
