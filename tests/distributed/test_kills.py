"""SIGKILL at random instants of a loop that does nothing but save: the same command goes on from the newest one."""

import os
import random
import signal
import time
from datetime import timedelta
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from torch import nn

from controlllm.config import CheckpointConfig
from controlllm.train.checkpoint import Checkpoints
from controlllm.train.distributed import World

pytestmark = pytest.mark.distributed
ROUNDS = 100
"""Of one and of two processes each."""


def small():
    model = nn.Sequential(nn.Linear(64, 200), nn.Linear(200, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=0.0)


def fill(model, optimizer, number):
    """Every weight is the step's number, and the optimizer's means are made of it."""
    for parameter in model.parameters():
        parameter.data.fill_(number)
        parameter.grad = torch.full_like(parameter, number)
    optimizer.step()


def checkpoints(folder, world):
    return Checkpoints(folder, CheckpointConfig(keep=2, keep_every=50), world=world, identity={"run": 1})


def save_for_ever(folder, rank, size, meeting, done):
    """What a run does, without the training; done[rank]: the last step whose save is over."""
    torch.set_num_threads(1)
    if size > 1:
        store = dist.FileStore(str(meeting), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    store, (model, optimizer) = checkpoints(folder, World(rank, size, rank)), small()
    state = store.restore(model, optimizer)
    number = state["step"] if state else 0
    while True:
        number += 1
        fill(model, optimizer, number)
        store.save(model, optimizer, {"step": number}, best=number % 7 == 0)  # waits for the one before
        done[rank] = number - 1


@pytest.mark.parametrize("size", [1, 2])
def test_after_every_kill_the_newest_is_whole_and_at_most_one_is_lost(tmp_path, capsys, size):
    context, rng, folder = get_context("fork"), random.Random(size), tmp_path / "run"
    hidden, last = 0, 0
    for trial in range(ROUNDS):
        done = context.Array("q", [-1] * size, lock=False)
        workers = [
            context.Process(target=save_for_ever, args=(folder, rank, size, tmp_path / f"meet-{trial}", done))
            for rank in range(size)
        ]
        for worker in workers:
            worker.start()
        while min(done) < 1 and all(worker.is_alive() for worker in workers):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.04))
        for worker in rng.sample(workers, len(workers)):
            os.kill(worker.pid, signal.SIGKILL)
        for worker in workers:
            worker.join()
            assert worker.exitcode == -signal.SIGKILL  # and no error before
        hidden += any(path.name.startswith(".") for path in folder.iterdir())
        model, optimizer = small()
        state = checkpoints(folder, World()).restore(model, optimizer)
        saved = max(done)
        assert max(saved, last) <= state["step"] <= saved + 2  # the one that runs may be over, too
        expected, its_optimizer = small()
        fill(expected, its_optimizer, state["step"])
        assert all((p == state["step"]).all() for p in model.parameters())
        last = state["step"]
    assert "passed over" not in capsys.readouterr().err
    assert hidden > ROUNDS // 5  # kills in the middle of a save
