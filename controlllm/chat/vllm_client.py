"""Answers by a vLLM engine in a process of its own, which ends with this one however this one ends."""

import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from controlllm import vllm_process
from controlllm.chat.engine import Request
from controlllm.errors import UserError
from controlllm.vllm_engine import ENVIRONMENT
from controlllm.vllm_process import cause_of, keep_log

START_SECONDS = 1800.0
BEAT_SECONDS = 0.1
"""So often is a person's Ctrl-C looked for while there is no token."""
Line = dict[str, Any]


class VLLMEngine:
    """The engine's process, seen from here. It is started at once; UserError where that fails."""

    one_at_a_time = True

    def __init__(self, folder: Path, *, dtype: str, gpus: int, alpha: float | None):
        """alpha: where the checkpoint's dial stands, None without one."""
        self.alpha, self.holds_base = alpha, alpha is not None
        self._numbers = count()
        self._scratch = tempfile.TemporaryDirectory(prefix="controlllm-chat-")
        self._log = Path(self._scratch.name, "vllm.log")
        settings = {"model": str(folder), "dtype": dtype, "gpus": gpus, "alpha": alpha}
        command = [vllm_process.python(), "-m", "controlllm.chat.vllm_worker", json.dumps(settings)]
        with self._log.open("wb") as log:
            self._process = vllm_process.start(command, environment=ENVIRONMENT, log=log, stdout=subprocess.PIPE)
        self._said: queue.Queue[Line | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            ready = self._next(START_SECONDS)
        except BaseException:
            self.close()
            raise
        if ready is None:
            self._fail(f"it did not start in {START_SECONDS / 60:.0f} minutes")
        self.context: int | None = ready["context"]
        self.about = f"{ready['dtype']} on {'cuda' if gpus else 'cpu'}, vLLM {ready['version']} ({ready['class']})"

    def answer(self, request: Request) -> "VLLMAnswer":
        if self._process.poll() is not None:
            raise UserError("vLLM has ended; start the chat again")
        return VLLMAnswer(self, request, next(self._numbers))

    def set_alpha(self, alpha: float) -> None:
        """Goes with the next request."""
        self.alpha = alpha

    def close(self) -> None:
        vllm_process.end(self._process)
        with suppress(BrokenPipeError):
            if self._process.stdin:
                self._process.stdin.close()
        self._scratch.cleanup()

    def tell(self, line: Line) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: its last words say why
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()

    def hear(self) -> Line | None:
        """What it says next, None where it says nothing for a moment."""
        return self._next(BEAT_SECONDS)

    def _next(self, seconds: float) -> Line | None:
        try:
            line = self._said.get(timeout=seconds)
        except queue.Empty:
            return None
        if line is None:
            self._fail(cause_of(self._log, self._process.wait()))
        return line

    def _fail(self, cause: str) -> NoReturn:
        kept = keep_log(self._log, "chat")
        self.close()
        raise UserError(f"--backend vllm: it failed: {cause}; --backend transformers needs no vLLM; its log is {kept}")

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._said.put(json.loads(line))
        self._said.put(None)


class VLLMAnswer:
    """One answer being written."""

    def __init__(self, engine: VLLMEngine, request: Request, number: int):
        self._engine, self._request, self._number = engine, request, number
        self.reused = 0
        self._tokens = self._written()

    def __iter__(self) -> Iterator[int | None]:
        return self._tokens

    def close(self) -> None:
        self._tokens.close()

    def _written(self) -> Generator[int | None, None, None]:
        request, engine = self._request, self._engine
        alpha = 0.0 if request.base else engine.alpha
        drawn = asdict(request.sampling) | {"seed": request.seed}
        asked = {"ids": request.ids, "room": request.room, "stop_tokens": sorted(request.stop), "alpha": alpha}
        engine.tell({"id": self._number} | asked | drawn)
        ended = False
        try:
            while not ended:
                line = engine.hear()
                if line is None:
                    yield None
                elif line["id"] == self._number:
                    ended = "end" in line
                    self.reused = line.get("reused", self.reused)
                    yield from line.get("tokens", [])
        finally:
            if not ended:
                engine.tell({"stop": self._number})
