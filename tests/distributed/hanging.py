"""A toy loop of which one rank goes wrong in one phase: for the watchdog's tests, by itself or under torchrun."""

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from controlllm.train.distributed import World
from controlllm.train.watchdog import Watchdog

PHASES = ("data", "forward", "save", "validate")
PATIENT = 3600
"""Of a watchdog before anything goes wrong: a busy machine is slow to start."""


def loop(world, *, wrong, how, phase, seconds, steps=10**6):
    """`wrong`: the rank that goes wrong in step 3."""
    with Watchdog(world, seconds=PATIENT) as dog:
        for step in range(steps):
            for name in PHASES:
                dog.phase(name, step)
                if (name, step) == (phase, 3):
                    wait_until_all_heard(dog, wrong, step, name, seconds)
                    if world.rank == wrong:
                        go_wrong(how)
                if name in ("forward", "validate"):
                    dist.all_reduce(torch.ones(1))
            time.sleep(0.01)


def wait_until_all_heard(dog, wrong, step, phase, seconds):
    """All ranks come here in this phase; `wrong` goes on when every other knows that it is there, and has gone on.

    However long that takes on a busy machine: only from then on a phase may last no longer than `seconds`.
    """
    store, rank, ranks = dist.distributed_c10d._get_default_store(), dog.world.rank, range(dog.world.size)

    def wait_for(condition: Callable[[], bool]):
        while not condition():
            dog.phase(phase, step)
            time.sleep(0.05)

    def has_heard():
        heard = dog._peers.heard.get(wrong)
        return heard is not None and (heard.beat.step, heard.beat.phase) == (step, phase)

    wait_for(has_heard)
    store.set(f"heard/{rank}", "")
    wait_for(lambda: store.check([f"heard/{other}" for other in ranks]))
    store.set(f"gone on/{rank}", "")  # from here on it asks the store nothing, which may stop with `wrong`
    dog.seconds = seconds
    if rank == wrong:
        wait_for(lambda: store.check([f"gone on/{other}" for other in ranks]))
        looks, look = [], dog._peers.next_gone
        dog._peers.next_gone = lambda wait: looks.append(wait) or look(wait)
        wait_for(lambda: len(looks) == 2)  # its thread has looked at the new limit, which C code keeps, too


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
