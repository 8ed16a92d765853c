"""An engine in processes of its own: one line of JSON per batch goes there, one comes back.

Whoever has room gets the next batch, so none waits for a slower one. Nothing stays behind, however it ends.
"""

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from controlllm import vllm_process
from controlllm.benchmark.engine import Pair, Prompt
from controlllm.errors import UserError
from controlllm.vllm_process import cause_of, keep_log

TIMEOUT_SECONDS = 1800.0  # without a word from any of them


@dataclass(frozen=True)
class Start:
    """How one process starts: the name of its engine, the arguments of that, and its environment."""

    engine: str  # of <engine>_worker.py, whose `serve(inbox, send, **arguments)` answers
    arguments: dict[str, Any]
    environment: dict[str, str]
    room: int  # batches that it may have at a time


class Workers:
    """They start with the first batch and live until `close`. UserError when one of them ends or is silent."""

    def __init__(self, starts: Sequence[Start], *, way_out: str):
        self.starts, self.way_out = starts, way_out
        self._workers: list[_Worker] = []
        self._busy = False
        self._said: queue.Queue[tuple[_Worker, str]] = queue.Queue()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def run(self, batches: Sequence[Sequence[Any]]) -> Iterator[tuple[int, list[Any]]]:
        """As `Engine.run`."""
        if self._busy:  # a run was left in the middle: its answers are not this one's
            self.close()
        if not self._workers:
            self._start()
        self._busy = True
        yield from self._run(batches)
        self._busy = False

    def close(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers, self._busy = [], False
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _start(self) -> None:
        self._said = queue.Queue()
        self._scratch = tempfile.TemporaryDirectory(prefix="controlllm-benchmark-")
        for number, start in enumerate(self.starts):
            self._workers.append(_Worker(start, Path(self._scratch.name, f"{number}.log"), self._said))

    def _run(self, batches: Sequence[Sequence[Any]]) -> Iterator[tuple[int, list[Any]]]:
        waiting = list(enumerate(batches))[::-1]
        given = 0
        for _ in range(max(start.room for start in self.starts)):  # in turn, else the first would get them all
            for worker in self._workers:
                if waiting and worker.given < worker.start.room:
                    worker.give(*waiting.pop())
                    given += 1
        while given:
            worker, answer = self._next()
            if waiting:
                worker.give(*waiting.pop())
                given += 1
            given -= 1
            yield answer["batch"], [tuple(a) if "pairs" in answer else a for a in answer["answers"]]

    def _next(self) -> tuple["_Worker", dict[str, Any]]:
        try:
            worker, line = self._said.get(timeout=TIMEOUT_SECONDS)
        except queue.Empty:
            self._fail(f"no answer in {TIMEOUT_SECONDS / 60:.0f} minutes", self._workers[0])
        if not line:
            self._fail(cause_of(worker.log, worker.process.wait()), worker)
        worker.given -= 1
        return worker, json.loads(line)

    def _fail(self, cause: str, worker: "_Worker") -> NoReturn:
        kept = keep_log(worker.log, "benchmark")
        self.close()
        name, cause = worker.start.engine, cause.removeprefix("controlllm.errors.UserError: ")
        raise UserError(f"benchmark: the {name} worker failed: {cause}; {self.way_out}; its log is {kept}")


class _Worker:
    def __init__(self, start: Start, log: Path, said: "queue.Queue[tuple[_Worker, str]]"):
        self.start, self.log, self.given = start, log, 0
        command = [sys.executable, "-m", "controlllm.benchmark.worker", start.engine, json.dumps(start.arguments)]
        with log.open("wb") as stream:
            self.process = vllm_process.start(
                command, environment=start.environment, log=stream, stdout=subprocess.PIPE
            )
        # Both ends in threads: a process that neither reads nor writes must not keep this one from its deadline.
        self.outbox: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._speak, daemon=True).start()
        threading.Thread(target=self._listen, args=(said,), daemon=True).start()

    def give(self, number: int, batch: Sequence[Any]) -> None:
        kind = "prompts" if isinstance(batch[0], Prompt) else "pairs"
        self.given += 1
        self.outbox.put(json.dumps({"batch": number, kind: [asdict(each) for each in batch]}) + "\n")

    def end(self) -> None:
        vllm_process.end(self.process)
        self.outbox.put("")

    def _speak(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError), self.process.stdin as lines:  # it has ended: its last words say why
            while line := self.outbox.get():
                lines.write(line)
                lines.flush()

    def _listen(self, said: "queue.Queue[tuple[_Worker, str]]") -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                said.put((self, line))
        said.put((self, ""))


def requests_of(line: dict[str, Any]) -> list[Any]:
    """The Pairs or Prompts of a line."""
    return [Pair(**each) for each in line["pairs"]] if "pairs" in line else [Prompt(**each) for each in line["prompts"]]
