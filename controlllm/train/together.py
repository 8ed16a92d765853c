"""Processes that do something together: every result everywhere, and an error of one is an error of all."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from controlllm.errors import UserError
from controlllm.train.distributed import World

TIMEOUT = timedelta(hours=2)
"""How long one waits for another that is still writing; when one dies, the others know at once."""
T = TypeVar("T")


class Together:
    """All processes of a run in a gloo group of its own, so that a thread can use it while training goes on.

    To be made by all at the same time; then one thread of each process uses it at a time.
    """

    def __init__(self, world: World):
        self.world = world
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if world.size > 1 else None

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        values = [value] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def do(self, action: Callable[[], T]) -> list[T]:
        """Every process's result of its own action; the first error of any of them is raised in all."""
        if self.world.size == 1:
            return [action()]
        try:
            outcome: Any = action()
        except (UserError, OSError) as error:
            outcome = error
        except Exception as error:  # noqa: BLE001 - raised below, in all processes
            outcome = RuntimeError(f"rank {self.world.rank}: {type(error).__name__}: {error}")
            outcome.__cause__ = error
        outcomes = self.gather(outcome)
        if isinstance(outcome, Exception):
            outcomes[self.world.rank] = outcome  # with its traceback
        for item in outcomes:
            if isinstance(item, Exception):
                raise item
        return outcomes
