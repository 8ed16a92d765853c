"""A request to stop (a spot machine's SIGTERM, Ctrl-C) waits for the step, so that it can be saved."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from controlllm.errors import Outage, RunError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_SECONDS = 1.0
"""One Ctrl-C reaches a process twice, from the terminal and from its launcher; a later one is a second."""


class StopRequest:
    """While it is entered, in the main thread, SIGTERM and SIGINT are noted in `signal`: the loop stops when it can.

    The second SIGINT raises KeyboardInterrupt at once. Each process notes its own: the loop asks all of them.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._interrupted: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # None: one that was not set from Python, and cannot be set again from there.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted > SAME_SECONDS:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        self.signal = self.signal or signal.Signals(number).name


class Stopped(RunError, Outage):
    """The run was asked to stop and did, with everything saved; `code` is what the shell expects of the signal."""

    def __init__(self, name: str, step: int):
        self.code = 128 + signal.Signals[name]
        super().__init__(f"stopped by {name} after step {step}, saved; the same command goes on from there")
