"""A process that hangs, or is gone, ends the whole run, and says where it was."""

import faulthandler
import itertools
import math
import os
import socket
import threading
import time
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from controlllm.errors import one_line
from controlllm.train.distributed import World
from controlllm.train.peers import KILLED, Beat, Heard, Peers, exchanges, where

TICK_SECONDS = 0.5
BEAT_SECONDS = 1.0
GRACE_SECONDS = 3.0
"""What all need to hear the verdict and write their stacks, before the first one's end makes a launcher end all."""
ASLEEP_SECONDS = 10.0
"""A process whose clock was not looked at for so long was itself stopped, and its phase begins anew."""
ERROR_SECONDS = 30.0
"""An error that all ranks meet ends all in this time; one that only one rank met leaves the others waiting."""
NO_GIL_SECONDS = 15.0


class Watchdog:
    """While it is entered, a rank that is in one phase for longer than `seconds` ends the run, as does one that dies.

    Every process writes the same line and its threads' stacks to stderr, and exits with code 1. The loop calls `phase`
    alike on every rank, so that what each has passed can be compared; a call with the same name shows that a long
    phase moves on. With `seconds` infinite nothing is watched, so that a person can debug.
    """

    def __init__(self, world: World, *, seconds: float):
        self.world, self.seconds = world, seconds
        self._now = (0, 0, "start", time.monotonic())
        self._awake = time.monotonic()
        self._peers: Peers | None = None
        self._threads: list[threading.Thread] = []
        self._done, self._wake, self._told = threading.Event(), threading.Event(), threading.Event()
        self._own: str | None = None  # the verdict of this process
        self._verdict: str | None = None  # what all agreed on
        self._word = ""
        self._error: tuple[float, str] | None = None  # of the next rank
        self._cut_off = False

    def phase(self, name: str, step: int) -> None:
        """What this process does from now on."""
        last = self._now
        phases = 0 if last[0] != step else last[1] + (last[2] != name)
        self._now = (step, phases, name, time.monotonic())

    def __enter__(self) -> "Watchdog":
        if math.isinf(self.seconds):
            return self
        self.phase("start", self._now[0])
        work = [self._watch]
        if self.world.size > 1:
            self._peers = Peers(self.world)
            work.append(self._beat)
        self._threads = [threading.Thread(target=one, name=f"watchdog{one.__name__}", daemon=True) for one in work]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._peers and _is_cut_off(error):
            self._cut_off = True  # the verdict, which names the rank that ended, is under way and ends this one, too
            time.sleep(GRACE_SECONDS)
        if error is not None:
            self._word = one_line(error) if isinstance(error, Exception) else type(error).__name__
        self._done.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(GRACE_SECONDS)  # one that waits for the store may stay behind
        if self._peers:
            self._peers.close()
        faulthandler.cancel_dump_traceback_later()

    def _beat(self) -> None:
        """Talks with the other processes, and may wait for the store while `_watch` decides."""
        peers = self._peers
        assert peers
        for number in itertools.count():
            own = self._own
            try:
                if self._done.is_set():
                    return peers.leave(self._word, self._mine(number))
                peers.tell(self._mine(number))
                self._verdict = peers.verdict(own)
            except dist.DistError:
                # Of the store nobody depends before something hangs, and then `blame` says how long it was silent.
                if self._done.is_set():
                    return None
            if own:
                self._told.set()
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()

    def _mine(self, number: int = 0) -> Beat:
        step, phases, name, _ = self._now
        seconds = round(self._in_phase(time.monotonic()), 3)
        begun = exchanges() if self._peers else 0
        return Beat(number, step, phases, begun, name, seconds, socket.gethostname(), os.getpid())

    def _in_phase(self, now: float) -> float:
        return now - max(self._now[3], self._awake)

    def _watch(self) -> None:
        """Looks at the local clock and at what was heard, and never waits for another process."""
        looked = time.monotonic()
        while not self._done.is_set():
            ended = self._peers.next_gone(TICK_SECONDS) if self._peers else self._pause()
            now = time.monotonic()
            if now - looked > ASLEEP_SECONDS:
                self._awake = now
            looked = now
            if not self._done.is_set() and (line := self._verdict or self._judge(now, ended)):
                self._end(line)
            if self._peers:
                # A call that never lets go of the interpreter stops this thread, too; then C code ends the process.
                # Not one that is alone: a person may have stopped it from the keyboard, for any time.
                faulthandler.dump_traceback_later(self.seconds + NO_GIL_SECONDS, exit=True, file=2)

    def _pause(self) -> None:
        self._done.wait(TICK_SECONDS)

    def _judge(self, now: float, ended: str | None) -> str | None:
        """The line that the run ends with, if it has to end."""
        peers, seconds = self._peers, self._in_phase(now)
        if peers and ended == KILLED:
            last = peers.heard.get(peers.next)
            where_last = f"; it was in phase '{last.beat.phase}' of step {last.beat.step}" if last else ""
            return f"rank {peers.next} is gone: {KILLED}{where_last}"
        if ended:
            self._error = (now, ended)
        if peers and self._error:
            waited = min(seconds, now - self._error[0]) > min(ERROR_SECONDS, self.seconds)
            if waited or self._cut_off:
                return f"rank {peers.next} ended with an error, and others wait for it: {self._error[1]}"
        if seconds <= self.seconds:
            return None
        said = peers.blame(self._mine()) if peers else where(0, Heard(self._mine()), now)
        return f"{said} (train.guards.hang_seconds {self.seconds:g})"

    def _end(self, line: str) -> NoReturn:
        """All processes come here within about a second, whoever saw it first."""
        if self._peers and not self._verdict:
            self._own = line
            self._wake.set()
            self._told.wait(GRACE_SECONDS)
        step, _, phase, _ = self._now
        mine = f"rank {self.world.rank}, in phase '{phase}' of step {step}: its threads, latest call first"
        os.write(2, f"error: {self._verdict or line}; every process stops\n{mine}\n".encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
        if self._peers:
            self._peers.wake_stopped()
            time.sleep(GRACE_SECONDS)
        os._exit(1)


def _is_cut_off(error: BaseException | None) -> bool:
    """Whether an error is how the end of another process comes up in this one."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
