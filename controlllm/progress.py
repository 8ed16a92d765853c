"""What a person sees while waiting: one line per stage, a bar with ETA on a terminal, a line now and then in a log."""

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, soft_wrap=True)

LOG_EVERY_SECONDS = 15.0


def prepare_environment() -> None:
    """What must be in the environment before torch and tqdm are imported."""
    # Threads that spin while they wait slow everything down on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # The bars of libraries would stand between ours, and as hundreds of lines in a log.
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    # By the names that DeepSpeed and torch's older FSDP call collectives.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # Whoever trains on a CPU knows, and our own line says so; accelerate imports DeepSpeed wherever it is installed.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "accelerator to CPU" not in record.getMessage())


TALKATIVE = (
    "torchao",  # kernels for other devices that it did not find, when transformers imports it
    "torch.utils._pytree",  # the way in which torchao registers its enums
    "bitsandbytes.backends.cpu.ops",  # a 4-bit kernel that nothing here uses
)
"""Loggers of libraries whose warnings are about the library, and not about the run: only their errors are shown."""


def is_first_process() -> bool:
    """Of those that a launcher started: what each of them finds out is said once."""
    return os.environ.get("RANK", "0") == "0"


class Advance(Protocol):
    def __call__(self, done: int, note: str = "") -> None: ...


@contextmanager
def track(stage: str, *, total: int, start: int = 0, unit: str = "") -> Iterator[Advance]:
    """Yield `advance(done, note)`; shows progress from `start` to `total` with the time that is left."""
    if console.is_terminal:
        with _bar() as bar:
            task = bar.add_task(f"  {stage}", total=total, completed=start, note=unit)

            def on_terminal(done: int, note: str = "") -> None:
                bar.update(task, completed=done, note=note or unit)

            yield on_terminal
    else:
        yield _Log(stage, total, start, unit)


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


class _Log:
    """Without a terminal: a line every few seconds, and one at the end."""

    def __init__(self, stage: str, total: int, start: int, unit: str):
        self.stage, self.total, self.start, self.unit = stage, total, start, unit
        self.began = self.printed = time.monotonic()

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if done < self.total and now - self.printed < LOG_EVERY_SECONDS:
            return
        self.printed = now
        left = (now - self.began) / max(done - self.start, 1) * (self.total - done)
        eta = f"ETA {duration(left)}" if done < self.total else f"in {duration(now - self.began)}"
        console.print(f"  {self.stage}: {done:,}/{self.total:,} {note or self.unit} · {eta}", markup=False)


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 07 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
