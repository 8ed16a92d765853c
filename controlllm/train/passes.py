"""The forward passes of a validation, dealt out to the processes; the numbers are those of one process alone."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from controlllm.data.loader import Batch, collate
from controlllm.data.shelf import PackedRow
from controlllm.progress import track
from controlllm.train.distributed import World
from controlllm.train.trained import piece_of

T = TypeVar("T")
# A validation that is over sooner needs no bar of its own.
QUIET_SECONDS = 3.0


class Passes:
    """Batch k always holds the same rows and is computed by process k mod size; results are put in order and summed
    exactly, so that neither the number of processes nor their way of sharing the model moves a digit."""

    def __init__(
        self,
        forward: Callable[..., Any],
        model: Any,
        *,
        world: World,
        autocast: Callable[[], AbstractContextManager[Any]],
        batch_size: int,
        beat: Callable[[], None] = lambda: None,
    ):
        self.forward, self.model, self.world, self.autocast = forward, model, world, autocast
        self.batch_size = batch_size
        self.beat = beat
        self._advance: Callable[[], None] = lambda: None

    @property
    def sharded(self) -> bool:
        """Whether every pass is one of all processes."""
        return any(isinstance(p, DTensor) or hasattr(p, "ds_id") or piece_of(p) for p in self.model.parameters())

    @contextmanager
    def evaluating(self, rounds: int) -> Iterator[None]:
        """The model as it is used and not trained; a bar over `rounds` passes of this process when it takes long."""
        self.model.eval()
        try:
            with torch.no_grad(), _bar(rounds, shown=self.world.is_main) as self._advance:
                yield
        finally:
            self._advance = lambda: None
            self.model.train()

    def rounds(self, batches: int) -> int:
        """Batches that one process sees."""
        return -(-batches // self.world.size)

    def own(self, batches: int, work: Callable[[int], T]) -> Iterator[tuple[int, T]]:
        """(k, work(k)) for this process's k of range(batches).

        All processes make equally many passes, because each one may gather parameters or buffers from all: who has no
        batch left does the last one again and throws the result away.
        """
        for start in range(0, batches, self.world.size):
            k = start + self.world.rank
            self.beat()
            with self.autocast():
                result = work(min(k, batches - 1))
            self._advance()
            if k < batches:
                yield k, result

    def in_order(self, mine: dict[int, T]) -> list[T]:
        """The results of all processes by k, on every process."""
        together = {k: result for part in self.world.gather(mine) for k, result in part.items()}
        return [together[k] for k in sorted(together)]

    def batches(self, rows: Sequence[PackedRow]) -> int:
        return -(-len(rows) // self.batch_size)

    def batch(self, rows: Sequence[PackedRow], k: int) -> Batch:
        return collate(rows[k * self.batch_size : (k + 1) * self.batch_size])

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """Of the model, on its device."""
        return {
            name: value.to(self.world.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.arguments(self.model.config._attn_implementation).items()
        }

    def mean_loss(self, rows: Sequence[PackedRow]) -> float:
        """Nats per target over all rows, without the divergence."""

        def loss(k: int) -> tuple[float, int]:
            batch = self.batch(rows, k)
            out = self.forward(**self.arguments(batch), num_items_in_batch=1, measure_divergence=False)
            return out.cross_entropy.item(), batch.targets

        return quotient(self.in_order(dict(self.own(self.batches(rows), loss))))


def quotient(parts: Sequence[tuple[float, int]]) -> float:
    """The sum of all first numbers, exactly rounded, by the sum of all second ones; not a number where one is not."""
    sums = [part for part, _ in parts]
    total = math.fsum(sums) if all(map(math.isfinite, sums)) else sum(sums)
    return total / sum(count for _, count in parts)


@contextmanager
def _bar(rounds: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    began, done, advance = time.monotonic(), 0, None
    with ExitStack() as stack:

        def one_more() -> None:
            nonlocal done, advance
            done += 1
            if done >= rounds or not shown or time.monotonic() - began < QUIET_SECONDS:
                return
            advance = advance or stack.enter_context(track("validate", total=rounds, start=done))
            advance(done)

        yield one_more
