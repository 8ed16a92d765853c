"""Held-back rows of a few chats, a model as the trainer has it, and its naive log-probabilities."""

import copy
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import torch

from controlllm.config import ValidationConfig
from controlllm.control.loss import forward_with_loss
from controlllm.data.catalog import assistant, user
from controlllm.data.render import render
from controlllm.train import attention
from controlllm.train.distributed import World
from controlllm.train.validate import Validation

CHATS = [("one and one?", "two"), ("a longer question, what is three and four?", "seven"), ("x?", "yes, x"), ("?", "!")]


def row_of(tokenizer, *documents):
    made = [render(document, tokenizer) for document in documents]
    return {
        "input_ids": np.concatenate([np.array(d.input_ids, np.uint32) for d in made]),
        "target": np.concatenate([np.array(d.target) for d in made]),
        "lengths": np.array([len(d.input_ids) for d in made]),
        "rows": np.arange(len(made)),
    }


def three_rows(tokenizer):
    chats = [[user(question), assistant(answer)] for question, answer in CHATS]
    return [
        row_of(tokenizer, "plain text", chats[0], chats[1]),
        row_of(tokenizer, chats[2]),
        row_of(tokenizer, chats[3]),
    ]


def trained(model, kernel="packed"):
    """As the trainer has it: packed attention, no cache."""
    attention.register()
    model.config.use_cache = False
    model.config._attn_implementation = kernel
    return model.train()


def validation(model, config=None, **changes):
    given = {"rows": [], "world": World(), "autocast": nullcontext, "micro_batch_size": 2} | changes
    forward = lambda **batch: forward_with_loss(model, **batch)  # noqa: E731
    return Validation(forward, model, config or ValidationConfig(), **given)


def perturb(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def documents(row):
    edges = np.cumsum([0, *row["lengths"]])
    for begin, end in pairwise(edges):
        yield torch.from_numpy(row["input_ids"][begin:end].astype(np.int64)), torch.from_numpy(row["target"][begin:end])


@torch.no_grad()
def log_probabilities(model, row):
    """At every target of a row, document by document; and the targets."""
    model = copy.deepcopy(model).eval()
    model.config._attn_implementation = "eager"
    for ids, target in documents(row):
        target[0] = False
        chances = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        yield chances[:-1][target[1:]], ids[1:][target[1:]]
