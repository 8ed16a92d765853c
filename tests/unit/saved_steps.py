"""Checkpoints of tiny models in which every weight is the number of the step."""

from pathlib import Path

import torch
from torch import nn

from controlllm.config import CheckpointConfig
from controlllm.train.checkpoint import Checkpoints
from controlllm.train.distributed import World

IDENTITY = {"base": "b1", "train.lr": 0.1, "sites": [1, 3]}


def checkpoints(folder, *, identity=IDENTITY, scratch=None, **config):
    return Checkpoints(folder, CheckpointConfig(**config), world=World(), identity=identity, scratch=scratch)


def small(value=0.0):
    """A model of a few hundred weights that all are `value`, and its optimizer after one step with gradients of 1."""
    model = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 1, bias=False))
    model[0].bias.requires_grad = False
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for parameter in model.parameters():
        parameter.data.fill_(value)
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    return model, optimizer


def write(folder, *steps, best=(), **config):
    store = checkpoints(folder, **config)
    for step in steps:
        store.save(*small(step), {"step": step, "tokens": 10 * step}, best=step in best)
    store.wait()
    return store


def value(model):
    found = {x for p in model.parameters() if p.requires_grad for x in p.flatten().tolist()}
    return found.pop() if len(found) == 1 else found


def restored(folder, **changes):
    """The step that is gone on from and what its weights are."""
    model, optimizer = small(-1)
    state = checkpoints(folder, **changes).restore(model, optimizer)
    return state and (state["step"], value(model))


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def big():
    model = nn.Linear(256, 256)
    return model, torch.optim.AdamW(model.parameters())
