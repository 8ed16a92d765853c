"""What stops a run that goes wrong: losses and gradients that are no numbers, and memory that is not there."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from controlllm.config import TrainConfig
from controlllm.data.loader import Mix
from controlllm.data.location import is_remote, shown
from controlllm.errors import RunError, UserError
from controlllm.progress import console
from controlllm.train.distributed import World

SHOWN = 8


class FiniteGuard:
    """Leaves out a step whose loss or gradient is not finite, and ends the run after `limit` of them in a row.

    The values are those of the whole step, so that every process decides the same; only one of them announces it.
    """

    def __init__(self, limit: int, *, announce: bool = True):
        self.limit, self.announce = limit, announce
        self.skipped = 0
        """In a row."""

    def check(self, step: int, *, loss: float, grad_norm: float, samples: Callable[[], list[str]]) -> bool:
        """Whether the step may be applied. `samples` names its rows, and is asked only when it may not.

        Raises RunError when more than `limit` steps in a row may not.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped = 0
            return True
        self.skipped += 1
        found = f"loss {loss:g} and gradient norm {grad_norm:g} are not finite"
        if math.isfinite(loss):
            found = f"gradient norm {grad_norm:g} is not finite (loss {loss:g})"
        elif math.isfinite(grad_norm):
            found = f"loss {loss:g} is not finite (gradient norm {grad_norm:g})"
        rows = "; ".join(samples())
        if self.skipped > self.limit:
            raise RunError(
                f"step {step}: {found}, the {_ordinal(self.skipped)} such step in a row (train.guards.max_skipped "
                f"{self.limit}); lower train.lr or look at its rows: {rows}"
            )
        if self.announce:
            left = f"{self.skipped} of at most {self.limit} in a row"
            console.print(f"  step {step} is left out ({left}): {found}; rows: {rows}", style="yellow", markup=False)
        return False

    def state(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load(self, state: dict[str, int]) -> None:
        self.skipped = state["skipped"]


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


def step_samples(
    mix: Mix, micro_batches: Sequence[Sequence[int]], losses: Sequence[float], *, world: World
) -> list[str]:
    """Names of the source rows in the micro-batches whose loss is not finite, on any process, with their place; of all
    rows of the step where every loss is finite. Every process calls this.

    micro_batches: for each of this process, the places of its packed rows in the mix's order · losses: one for each
    """
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    everywhere = world.gather(bad)
    if any(everywhere):
        mine = [
            f"rank {world.rank}, micro-batch {number}: {', '.join(sample_names(mix, micro_batches[number]))}"
            for number in bad
        ]
        lines = [line for lines in world.gather(mine) for line in lines]
        return _at_most(lines, len(lines))
    names = _names(mix, [place for batch in micro_batches for place in batch])
    gathered = world.gather((names[:SHOWN], len(names)))
    return _at_most([name for some, _ in gathered for name in some], sum(count for _, count in gathered))


def sample_names(mix: Mix, positions: Sequence[int]) -> list[str]:
    """`dataset:file:row` of the source rows whose documents lie in the packed rows at these places of the mix's order;
    rows are counted as everywhere in errors: from 1, the line in formats of lines."""
    names = _names(mix, positions)
    return _at_most(names, len(names))


def _names(mix: Mix, positions: Sequence[int]) -> list[str]:
    names: dict[str, None] = {}
    for position in positions:
        dataset, unit, row = mix.place(position)
        shelf = mix.shelves[dataset]
        source = shelf.facts(unit)["unit"]
        file = shown(source["uri"])
        if source["start"] and source["format"] == "jsonl" and is_remote(source["uri"]):
            file += f" from byte {source['start']}"  # of such a file only the unit is read, and its lines are counted
        names |= dict.fromkeys(f"{shelf.name}:{file}:{number}" for number in shelf.read(unit, row)["rows"].tolist())
    return list(names)


def _at_most(names: list[str], count: int) -> list[str]:
    """The first few of `count`."""
    return names if count <= SHOWN else [*names[:SHOWN], f"and {count - SHOWN} more"]


def out_of_memory(
    error: BaseException, config: TrainConfig, *, context_length: int, device: torch.device
) -> UserError | None:
    """What to change, gentlest first, when the error says that memory is used up; None for any other error."""
    text = str(error)
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not (
        isinstance(error, RuntimeError) and re.search(_CPU_REFUSED + "|" + _CUDA_REFUSED, text)
    ):
        return None
    where = str(device) if device.type == "cuda" else "the machine (CPU)"
    facts = f" ({said})" if (said := _amounts(text)) else ""
    changes = ", ".join(_savings(config, context_length, device))
    return UserError(f"out of memory on {where}{facts}; change, in this order: {changes}")


_CPU_REFUSED = r"can't allocate memory|not enough memory: you tried to allocate"
_CUDA_REFUSED = r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cuda failure.*out of memory"


def _amounts(text: str) -> str:
    """How much was wanted and how much was free, as far as the allocator says so."""
    wanted = re.search(r"ried to allocate ([\d.]+ ?(?:[KMGT]i?B|bytes)?)", text)
    free = re.search(r"of which ([\d.]+ [KMGT]iB) is free", text)
    said = []
    if wanted:
        amount = wanted[1].removesuffix("bytes").strip().rstrip(".")
        said.append(f"{_bytes(int(amount)) if amount.isdigit() else amount} wanted")
    return ", ".join([*said, *([f"{free[1]} free"] if free else [])])


def _bytes(count: int) -> str:
    power = min(max(count.bit_length() - 1, 0) // 10, 4)
    return f"{count / (1 << 10 * power):.3g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _savings(config: TrainConfig, context_length: int, device: torch.device) -> list[str]:
    """Settings that can still save memory, with their present values."""
    parallel: Any = config.parallel
    changes = []
    size = config.micro_batch_size
    if size > 1:
        smaller = next(n for n in range(size // 2, 0, -1) if size % n == 0)  # so that it divides the global batch
        changes.append(f"train.micro_batch_size {size} -> {smaller}")
    stronger = {"none": "selective", "selective": "full"}.get(config.activation_checkpointing)
    if stronger:
        changes.append(f"train.activation_checkpointing {config.activation_checkpointing} -> {stronger}")
    if parallel.kind == "ddp":
        changes.append("train.parallel.kind ddp -> fsdp, over several processes")
    if parallel.kind == "fsdp":
        if parallel.frozen == "replicate":
            changes.append("train.parallel.frozen replicate -> shard")
        if not parallel.reshard_after_forward:
            changes.append("train.parallel.reshard_after_forward false -> true")
        if not parallel.cpu_offload and device.type == "cuda":
            changes.append("train.parallel.cpu_offload false -> true")
    if config.optimizer.name == "adamw" and config.precision not in ("bf16_stochastic", "bf16_kahan"):
        changes.append("train.optimizer.name adamw -> adamw_8bit")
    return [*changes, f"pack.context_length {context_length} -> {max(context_length // 2, 1)}"]
