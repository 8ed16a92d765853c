"""pdb in one process of several: before the first step, and where an error comes up.

While a person thinks nothing may run out: with `--debug` there is no watchdog (`seconds` infinite) and the process
group's timeout is a day.
"""

import pdb
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType, TracebackType
from typing import Any, TextIO

from controlllm.errors import UserError
from controlllm.train.distributed import World


def stop_before_first_step(world: World, rank: int = 0) -> None:
    """Stop rank `rank` at the next line of the caller; the others wait in the step's first exchange.

    Every process calls this. Raises UserError when there is no such rank.
    """
    if not 0 <= rank < world.size:
        raise UserError(f"--rank {rank}: there are ranks 0 to {world.size - 1}; give one of them")
    world.barrier()  # the output of all that came before does not run into the prompt
    if world.rank == rank:
        print(f"rank {rank} stops before the first step: n is the next line, c goes on, h helps", file=sys.stderr)
        Debugger(world).set_trace(sys._getframe(1))


@contextmanager
def post_mortem(world: World, rank: int = 0) -> Iterator[None]:
    """An error inside is first looked at in pdb, on rank `rank`, where it came up; then it goes on its way."""
    try:
        yield
    except Exception as error:
        if world.rank == rank and error.__traceback__ is not None:
            print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
            debugger = Debugger(world)
            debugger.reset()
            debugger.interaction(None, error.__traceback__.tb_next or error.__traceback__)
        raise


class Debugger(pdb.Pdb):
    """pdb that reads the terminal from any process of a launcher, and goes on where there is none."""

    def __init__(self, world: World):
        super().__init__(nosigint=True)  # Ctrl-C stays what the run makes of it
        self._launched = world.size > 1

    def interaction(self, frame: FrameType | None, traceback: TracebackType | None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self._launched:
            super().interaction(frame, traceback)
            return
        before, sys.stdin = sys.stdin, _terminal()
        try:
            super().interaction(frame, traceback)
        finally:
            sys.stdin = before

    def do_EOF(self, arg: Any) -> bool:
        self.message("no more input for pdb: going on")
        self.set_continue()
        return True


@cache
def _terminal() -> TextIO:
    """A launcher's children have their input closed in Python, not in the system. Opened once: it reads ahead."""
    return open("/dev/stdin")
