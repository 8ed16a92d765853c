"""How much memory a process of a run needs, known from the model's sizes and the settings before anything is loaded."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from controlllm.config import FSDP, RunConfig
from controlllm.errors import UserError
from controlllm.model_shape import Shape
from controlllm.step_memory import Device, Parts, Step

GIGABYTE = 10**9


@dataclass(frozen=True)
class Memory:
    """Of one process, at the worst moment of each. Without a GPU both are the same memory."""

    device: Parts
    host: Parts


@dataclass(frozen=True)
class Machine:
    """What this machine trains on."""

    device: Device
    devices: int
    """GPUs, or 1."""
    bytes: int | None
    """Memory of one of them, or what is free now without a GPU; None where it is not known."""

    @property
    def name(self) -> str:
        return "its GPU" if self.device == "cuda" else "this machine's free memory"


@dataclass(frozen=True)
class Change:
    """A setting that takes another amount of memory."""

    overrides: tuple[str, ...]
    memory: Memory


def predict(shape: Shape, config: RunConfig, *, processes: int = 1, device: Device = "cuda") -> Memory:
    """The peak of each of `processes` processes; UserError where the model's sizes are unknown or sizes do not fit."""
    step = Step(shape, config, processes=processes, device=device)
    return Memory(*(max(moments, key=lambda parts: parts.total) for moments in (step.moments(), step.host_moments())))


def changes(shape: Shape, config: RunConfig, *, processes: int = 1, device: Device = "cuda") -> list[Change]:
    """Every setting that would change the device's peak, the one that saves most first."""
    now = predict(shape, config, processes=processes, device=device).device.total
    found = []
    for overrides, other, count in _alternatives(config, processes, alone=device == "cpu" and processes == 1):
        changed = Change(overrides, predict(shape, other, processes=count, device=device))
        if changed.memory.device.total != now:
            found.append(changed)
    return sorted(found, key=lambda change: change.memory.device.total)


def _alternatives(config: RunConfig, processes: int, *, alone: bool) -> list[tuple[tuple[str, ...], RunConfig, int]]:
    """(what to write behind the recipe, the config with it, the number of processes)

    alone: several processes would share the memory that one has.
    """
    train, parallel = config.train, config.train.parallel
    found: list[tuple[tuple[str, ...], RunConfig, int]] = []

    def add(override: str, *, count: int = processes, option: str = "", **update: object) -> None:
        other = config.model_copy(update={"train": train.model_copy(update=update)})
        found.append(((override, *([option] if option else [])), other, count))

    if train.micro_batch_size > 1:
        half = next(n for n in range(train.micro_batch_size // 2, 0, -1) if train.global_batch_size % n == 0)
        add(f"train.micro_batch_size={half}", micro_batch_size=half)
    for mode in {"none": ("selective", "full"), "selective": ("full",), "full": ()}[train.activation_checkpointing]:
        add(f"train.activation_checkpointing={mode}", activation_checkpointing=mode)
    if train.optimizer.name == "adamw" and train.precision not in ("bf16_stochastic", "bf16_kahan"):
        optimizer = train.optimizer.model_copy(update={"name": "adamw_8bit"})
        add("train.optimizer.name=adamw_8bit", optimizer=optimizer)
    if isinstance(parallel, FSDP):
        other = "shard" if parallel.frozen == "replicate" else "replicate"
        add(f"train.parallel.frozen={other}", parallel=parallel.model_copy(update={"frozen": other}))
        if not parallel.reshard_after_forward:
            again = parallel.model_copy(update={"reshard_after_forward": True})
            add("train.parallel.reshard_after_forward=true", parallel=again)
        if not parallel.cpu_offload:
            offloaded = parallel.model_copy(update={"cpu_offload": True})
            add("train.parallel.cpu_offload=true", parallel=offloaded)
    elif not alone:
        count = processes if processes > 1 else 8
        add("train.parallel.kind=fsdp", count=count, option=f"--processes {count}", parallel=FSDP())
    frozen = not config.method.trains_all
    if frozen and config.model.dtype == "float32" and train.precision in ("bf16", "fp16", "float8"):
        narrow = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
        found.append((("model.dtype=bfloat16",), narrow, processes))
    return found


def check_memory(config: RunConfig, shape: Shape) -> None:
    """UserError where the predicted peak is more than this machine's device has; nothing where that is not known."""
    machine = this_machine()
    if shape.decoder is None or machine.bytes is None:
        return
    several = machine.devices if isinstance(config.train.parallel, FSDP) else 1
    processes = int(os.environ.get("WORLD_SIZE", several))
    memory = predict(shape, config, processes=processes, device=machine.device)
    room = machine.bytes
    if (needed := peak(memory, machine)) <= room:
        return
    options = changes(shape, config, processes=processes, device=machine.device)
    less = [change for change in options if peak(change.memory, machine) < needed]
    raise UserError(
        f"training needs {needed / GIGABYTE:.1f} GB per process and {machine.name} has {room / GIGABYTE:.1f}; "
        + (_first(less, room, machine) if less else "choose a smaller model or pack.context_length")
        + " (all parts: controlllm memory RECIPE)"
    )


def _first(less: list[Change], room: int, machine: Machine) -> str:
    """The gentlest change that is enough, or the one that saves most."""
    enough = [change for change in less if peak(change.memory, machine) <= room]
    change = enough[-1] if enough else less[0]
    return f"set {' with '.join(change.overrides)}: {peak(change.memory, machine) / GIGABYTE:.1f} GB"


def peak(memory: Memory, machine: Machine) -> int:
    """What has to fit into the machine's device: without a GPU the host's part, too."""
    return memory.device.total + (memory.host.total if machine.device == "cpu" else 0)


def this_machine() -> Machine:
    """By nvidia-smi; without a GPU what is free of the memory, or of the control group's share of it."""
    if smi := shutil.which("nvidia-smi"):
        command = [smi, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if sizes := [int(line) << 20 for line in answer.stdout.split() if line.isdigit()]:
            return Machine("cuda", len(sizes), min(sizes))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = [size for size in (_free(), _free_of_group()) if size is not None]
    return Machine("cpu", 1, min(free) // processes if free else None)


def _free() -> int | None:
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _free_of_group() -> int | None:
    """Of a container with a limit."""
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if not (limit.exists() and used.exists()) or not (most := limit.read_text().strip()).isdigit():
        return None
    return max(int(most) - int(used.read_text()), 0)
