"""What the processes of a run know of each other, whatever their main threads wait for."""

import json
import os
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import ip_address
from select import select
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from controlllm.progress import console
from controlllm.train.distributed import World

SILENT_SECONDS = 5.0
"""Beats come every second: one who was not heard of for this long does not run."""
BEATS_PER_SECOND = 64
"""So many of the others' beats a process asks the store for; with more processes each is heard more rarely."""
CONNECT_SECONDS = 30
KILLED = "it was killed, or its machine is gone"
LEFT = -1
"""Number of a process's last beat."""


class Beat(NamedTuple):
    """What a process says of itself about once a second."""

    number: int
    step: int
    phases: int
    """Phases of this step before the present one."""
    exchanges: int
    """Collective operations begun so far: who waits in one has begun more than who has not come to it."""
    phase: str
    seconds: float
    """In this phase."""
    host: str
    pid: int


@dataclass
class Heard:
    """A process's last beat, and when it came, by this process's clock."""

    beat: Beat
    at: float = field(default_factory=time.monotonic)


class Peers:
    """Beats and the verdict go through the job's store; a wire to the next rank tells at once when that one dies.

    All but `next_gone` and `wake_stopped` may block for as long as the store does: call them on a thread for it.
    """

    def __init__(self, world: World):
        self.rank, self.size = world.rank, world.size
        self.next = (world.rank + 1) % world.size
        self.heard: dict[int, Heard] = {}
        self.left: set[int] = set()
        self.answered = self._asked = time.monotonic()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.home = f"{host}:{port}"
        wait = timedelta(seconds=CONNECT_SECONDS)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=wait)
        # A launcher that starts the processes again keeps its store; the count tells apart watches in one process.
        attempt = f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._store = PrefixStore(f"{attempt}/{store.add(f'{attempt}/{self.rank}', 1)}", store)
        self._server, address = _listen(host, port)
        self._wire: socket.socket | None = None
        self._wired = False
        self._store.set(f"address/{self.rank}", address)

    def tell(self, beat: Beat) -> None:
        """Publish a beat, hear the others'. Raises DistError when the store does not answer."""
        self._store.set(f"beat/{self.rank}", json.dumps(beat))
        now = time.monotonic()
        self.heard[self.rank] = Heard(beat, now)
        if now - self._asked > self.size / BEATS_PER_SECOND:
            self._hear()
            self._asked = time.monotonic()
        if not self._wired:
            self._connect()

    def verdict(self, line: str | None = None) -> str | None:
        """What the run ends with, if it does: the first line that any process gave. Raises DistError."""
        if line is not None:
            return self._store.compare_set("verdict", "", line).decode()
        found = self._store.get("verdict").decode() if self._store.check(["verdict"]) else None
        self.answered = time.monotonic()
        return found

    def _hear(self) -> None:
        others = [rank for rank in range(self.size) if rank != self.rank and rank not in self.left]
        here = [rank for rank in others if rank in self.heard or self._store.check([f"beat/{rank}"])]
        for rank, text in zip(here, self._store.multi_get([f"beat/{rank}" for rank in here]), strict=True):
            beat = Beat(*json.loads(text))
            if beat.number == LEFT:
                self.left.add(rank)
                self.heard.pop(rank, None)
            elif rank not in self.heard or self.heard[rank].beat.number != beat.number:
                self.heard[rank] = Heard(beat)

    def _connect(self) -> None:
        """Nothing is sent over the wire but a last word: the kernel closes it when its process dies, and only then."""
        if not self._store.check([f"address/{self.next}"]):
            return
        self._wired = True
        address = self._store.get(f"address/{self.next}").decode()
        try:
            self._wire = _wire(address) if address else None
        except OSError as error:
            console.print(
                f"rank {self.rank} cannot reach rank {self.next} at {address} ({error.strerror or error}): should that "
                "one die, it is noticed after train.guards.hang_seconds only",
                style="yellow",
            )

    def next_gone(self, wait: float) -> str | None:
        """How the next rank ended, waiting at most so many seconds for it: its error's line, "" without one, or KILLED.

        None while it is there.
        """
        wire = self._wire
        if wire is None:
            time.sleep(wait)
            return None
        if not select([wire], [], [], wait)[0]:
            return None
        self._wire = None
        with wire, suppress(OSError):
            wire.settimeout(wait)
            if word := wire.recv(1 << 12):
                return word[1:].decode(errors="replace")
        return KILLED

    def leave(self, word: str, beat: Beat) -> None:
        """The last word of this process: an error's line, or nothing. Raises DistError."""
        with self._server, suppress(BlockingIOError):
            self._server.setblocking(False)
            connection, _ = self._server.accept()
            with connection, suppress(OSError):  # the one who would read it may be gone
                connection.sendall(b"." + word.encode()[:4000])
        self._store.set(f"address/{self.rank}", "")
        self._store.set(f"beat/{self.rank}", json.dumps(beat._replace(number=LEFT)))

    def close(self) -> None:
        """The wire; not before the thread that listens to it has ended."""
        if self._wire is not None:
            self._wire.close()

    def blame(self, mine: Beat) -> str:
        """Whom the others wait for, as a line, by what was heard last; waits for nothing."""
        now = time.monotonic()
        heard, ranks = self.heard | {self.rank: Heard(mine, now)}, set(range(self.size)) - self.left
        if (silent := now - self.answered) <= SILENT_SECONDS:
            return blame(heard, ranks=ranks, now=now)
        then = blame(heard, ranks=ranks, now=self.answered)
        return f"{then}, when the job's store at {self.home} fell silent {silent:.0f} s ago"

    def wake_stopped(self) -> None:
        """Let those of this machine that were stopped go on, so that they can end themselves."""
        for heard in list(self.heard.values()):
            if heard.beat.host == socket.gethostname() and heard.beat.pid != os.getpid():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(heard.beat.pid, signal.SIGCONT)


def exchanges() -> int:
    """Collective operations that this process has begun, over all its groups."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


def _listen(master: str, port: int) -> tuple[socket.socket, str]:
    """A socket on which nobody answers, and the address at which the other machines reach it."""
    with socket.create_connection((master, port), timeout=CONNECT_SECONDS) as probe:
        here = probe.getsockname()[0]
        server = socket.create_server(("", 0), family=probe.family)
    # On its own machine the main process's name may mean the loopback, which is another place for all others.
    return server, f"{master if ip_address(here).is_loopback else here}:{server.getsockname()[1]}"


def _wire(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    wire = socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS)
    for name, value in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}.items():
        if hasattr(socket, name):  # a machine that lost its power closes nothing
            wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return wire


def blame(heard: Mapping[int, Heard], *, ranks: set[int], now: float) -> str:
    """One of `ranks` who is silent or missing, or else those who are furthest behind."""
    limit = SILENT_SECONDS + 2 * len(ranks) / BEATS_PER_SECOND
    silent = {rank: now - one.at for rank, one in heard.items() if now - one.at > limit}
    if silent:
        rank = max(silent, key=lambda rank: silent[rank])
        beat = heard[rank].beat
        return f"rank {rank} was last heard of {silent[rank]:.0f} s ago, in phase '{beat.phase}' of step {beat.step}"
    if missing := sorted(ranks - heard.keys()):
        return f"rank {missing[0]} has not begun to train"
    places = {rank: (one.beat.step, one.beat.phases, one.beat.exchanges) for rank, one in heard.items()}
    behind = [rank for rank in sorted(places) if places[rank] == min(places.values())]
    line = where(behind[0], heard[behind[0]], now)
    if len(behind) == len(ranks) > 1:
        return f"{line}, as have the other {len(ranks) - 1}: they wait for each other, or for one that is stuck there"
    return line + (f", as has rank {', '.join(map(str, behind[1:]))}" if len(behind) > 1 else "")


def where(rank: int, heard: Heard, now: float) -> str:
    beat = heard.beat
    seconds = beat.seconds + now - heard.at
    return f"rank {rank} has been in phase '{beat.phase}' of step {beat.step} for {seconds:.0f} s"
