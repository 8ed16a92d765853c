"""A toy loop of which one rank goes wrong in one phase: for the watchdog's tests, by itself or under torchrun."""

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from controlllm.train.distributed import World
from controlllm.train.watchdog import Watchdog

PHASES = ("data", "forward", "save", "validate")


def loop(world, *, wrong, how, phase, seconds, steps=10**6):
    """`wrong`: the rank that goes wrong in step 3."""
    with Watchdog(world, seconds=seconds) as dog:
        for step in range(steps):
            for name in PHASES:
                dog.phase(name, step)
                if (world.rank, name, step) == (wrong, phase, 3):
                    wait_until_told(dog, (step, name))
                    go_wrong(how)
                if name in ("forward", "validate"):
                    dist.all_reduce(torch.ones(1))
            time.sleep(0.01)


def wait_until_told(dog, place):
    """This rank has said where it is, and the others had time to hear it."""
    while own_beat(dog) != place:
        time.sleep(0.1)
    time.sleep(2)


def own_beat(dog):
    told = dog._peers and dog._peers.heard.get(dog.world.rank)
    return told and (told.beat.step, told.beat.phase)


def go_wrong(how):
    if how == "sleep":
        time.sleep(3600)
    elif how in ("stop", "stop the store"):
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(3600)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "raise":
        raise ValueError("only here")
    while how == "spin":
        pass
    if how == "native":
        sum(range(1 << 62))  # one call that keeps the interpreter for years


if __name__ == "__main__":
    _how, _phase, _seconds = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: None)  # as the trainer, which wants to save first
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    _world = World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    loop(_world, wrong=1, how=_how, phase=_phase, seconds=float(_seconds))
