"""Which packed rows of a step are this process's: a pure function of step, rank and number of processes."""

import hashlib
import math

import torch

from controlllm.config import TrainConfig
from controlllm.data.loader import Batch, Mix, collate, empty_batch
from controlllm.train.distributed import World


class Share:
    """Row g of the global batch goes to rank g mod world, whatever the number of processes."""

    def __init__(self, mix: Mix, config: TrainConfig, world: World):
        self.mix, self.world = mix, world
        self.global_batch, self.micro_batch = config.global_batch_size, config.micro_batch_size
        # As many on every process: under FSDP each pass is one of all.
        self.rounds = math.ceil(math.ceil(self.global_batch / world.size) / self.micro_batch)

    def places(self, step: int) -> list[list[int]]:
        """For each micro-batch, the places of its rows in the mix's order; none in those that only keep step."""
        first = step * self.global_batch
        own = range(first + self.world.rank, first + self.global_batch, self.world.size)
        return [list(own[k * self.micro_batch : (k + 1) * self.micro_batch]) for k in range(self.rounds)]

    def of(self, step: int) -> list[Batch]:
        """The micro-batches of optimizer step `step` (from 0)."""
        return [
            collate(map(self.mix.row, places)) if places else empty_batch(self.mix.row(step * self.global_batch))
            for places in self.places(step)
        ]


def seed_place(seed: int, step: int, place: int) -> None:
    """Everything random in a micro-batch follows from its place in the run: nothing of it has to be saved."""
    digest = hashlib.blake2b(f"{seed} {step} {place}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "big"))
