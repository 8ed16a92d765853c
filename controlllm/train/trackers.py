"""The lines of metrics.jsonl in TensorBoard, Weights & Biases and MLflow, through accelerate's trackers.

Each is brought up to date from the file: what it has already is not sent again, what it lacks is sent late. Sending is
a thread's work, so that a server that does not answer holds up no training step.
"""

import importlib.util
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from controlllm.config import MetricsConfig
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.train.curves import OPEN, Curves, History, Row, RunFacts, without_password

START_SECONDS = 120.0
"""For a tracker of a new run to be reached; without one, a run would find out at its end."""
WAIT_SECONDS = 30.0
"""For what was not sent yet, at a checkpoint and at the end."""


def missing_trackers(config: MetricsConfig) -> str | None:
    """One line about trackers that are not installed, or None."""
    missing = [name for name in config.trackers if not _installed(name)]
    if not missing:
        return None
    one = len(missing) == 1
    return (
        f"train.metrics.trackers: {', '.join(missing)} {'is' if one else 'are'} not installed; pip install "
        f"'controlllm[trackers]', or leave {'it' if one else 'them'} out of the list"
    )


class Trackers:
    """All that `config` names, and each thread that sends to one. UserError if a new run cannot reach one."""

    def __init__(self, config: MetricsConfig, folder: Path, run: RunFacts, history: History):
        if message := missing_trackers(config):
            raise UserError(message)
        self.senders = [_Sender(name, lambda n=name: OPEN[n](folder, config, run, history)) for name in config.trackers]
        for sender in self.senders:
            for number, row in enumerate(history.rows, start=history.first):
                sender.put(number, row)
        for sender in self.senders:
            sender.begin(resumed=history.step > 0)
            if not history.step and sender.error is not None:
                self.close()
                raise UserError(
                    f"train.metrics.trackers: {sender.name} cannot be reached: {_short(sender.error)}; mend that, or "
                    "leave it out of the list"
                )

    def log(self, number: int, row: Row) -> None:
        for sender in self.senders:
            sender.put(number, row)

    def wait(self) -> None:
        """Until everything is sent that a working tracker takes."""
        end = time.monotonic() + WAIT_SECONDS
        for sender in self.senders:
            sender.wait(end)

    def close(self) -> None:
        end = time.monotonic() + WAIT_SECONDS
        for sender in self.senders:
            sender.close(end)


class _Sender:
    """Sends lines in their order; what could not be sent is tried again with the next line."""

    def __init__(self, name: str, opening: Callable[[], Curves]):
        self.name, self.opening = name, opening
        self.curves: Curves | None = None
        self.error: Exception | None = None
        self.resumed = False
        self.arriving: queue.Queue[tuple[int, Row] | None] = queue.Queue()
        self.pending: deque[tuple[int, Row]] = deque()
        self.tried = threading.Event()
        # Of a process that ends, it is not waited for longer than `close` does.
        self.thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)

    def begin(self, *, resumed: bool) -> None:
        """Returns when the tracker was opened or has failed, or after START_SECONDS; only a new run ends on failure."""
        self.resumed = resumed
        self.thread.start()
        if not self.tried.wait(START_SECONDS):
            _say(f"{self.name} does not answer; training goes on, and lines are sent when it does", "yellow")

    def put(self, number: int, row: Row) -> None:
        self.arriving.put((number, row))

    def wait(self, end: float) -> None:
        with self.arriving.all_tasks_done:
            self.arriving.all_tasks_done.wait_for(
                lambda: not self.arriving.unfinished_tasks or self.error is not None, end - time.monotonic()
            )

    def close(self, end: float) -> None:
        self.arriving.put(None)
        if self.thread.ident is not None:
            self.thread.join(max(0.0, end - time.monotonic()))
        if self.pending:
            _say(f"{self.name}: {len(self.pending)} lines were not sent; metrics.jsonl has them", "yellow")

    def _run(self) -> None:
        self._send()
        self.tried.set()
        while (item := self.arriving.get()) is not None:
            self.pending.append(item)
            self._send()
            self.arriving.task_done()
        if self.curves is not None:
            self._guarded(self.curves.tracker.finish)

    def _send(self) -> None:
        if self._guarded(self._send_pending) and self.error is not None:
            self.error = None
            _say(f"{self.name} works again", "yellow")

    def _send_pending(self) -> None:
        if self.curves is None:
            self.curves = self.opening()
            _say(f"{self.name}: {self.curves.where}")
        while self.pending:
            number, row = self.pending[0]
            if not self.curves.has(number, row):
                self.curves.log(number, row)
            self.pending.popleft()

    def _guarded(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, training goes on
            if self.error is None and (self.resumed or self.tried.is_set()):
                _say(f"{self.name} fails, training goes on: {_short(error)}", "yellow")
            self.error = error
            return False
        return True


def _installed(module: str) -> bool:
    """A folder of that name where the command runs, as trackers leave them, is no package."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def _say(text: str, style: str | None = None) -> None:
    console.print(f"  {text}", style=style, markup=False)


def _short(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return without_password(f"{type(error).__name__}: {first[:300]}")
