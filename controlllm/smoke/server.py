"""vLLM's OpenAI server for one smoke test: on a socket in a folder of its own, gone when the test is."""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any, NoReturn

import httpx2

from controlllm import vllm_process
from controlllm.errors import UserError
from controlllm.smoke.greedy import Greedy
from controlllm.vllm_engine import ENVIRONMENT

SOCKET_PATH = 100  # bytes; the system allows a few more
HOST = "http://vllm"  # who is asked is said by the socket
NAME = "model"
GREEDY = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
GREEDY |= {"presence_penalty": 0, "frequency_penalty": 0}
"""Whatever the checkpoint's own defaults for sampling are."""


@dataclass
class Server:
    process: "Popen[str]"
    socket: Path
    log: Path
    seconds: float
    """From `wait` to the last answer."""
    deadline: float = float("inf")
    """By time.monotonic()."""

    def open(self) -> None:
        """Let it load the model, and return at once."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it ended before it read them: `wait` says why
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def wait(self) -> None:
        """Until it answers."""
        self.deadline = time.monotonic() + self.seconds
        while True:
            if (code := self.process.poll()) is not None:
                self._fail(vllm_process.cause_of(self.log, code))
            try:
                with self.client(timeout=5) as client:
                    client.get("/health").raise_for_status()
                return
            except (httpx2.TransportError, httpx2.HTTPStatusError):
                self._check_time("had not loaded the model")
                time.sleep(0.1)

    def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a POST."""
        try:
            with self.client() as client:
                answer = client.post(path, json=dict(body))
        except httpx2.TimeoutException:
            self.late("gave no answer")
        except httpx2.TransportError:
            self._fail(self._why_gone())
        if answer.is_error:
            self._fail(f"{path} answers {answer.status_code}: {_said(answer)}")
        return answer.json()

    def first_token_seconds(self, tokens: Sequence[int], *, salt: str) -> float:
        """From the question to the first of its answer. salt: nothing is taken from the cache of other salts."""
        body = GREEDY | {"model": NAME, "prompt": list(tokens), "max_tokens": 2, "stream": True, "cache_salt": salt}
        began = time.perf_counter()
        try:
            with self.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                next(line for line in answer.iter_lines() if line.startswith("data:"))
                return time.perf_counter() - began
        except httpx2.TimeoutException:
            self.late("gave no first token")
        except (httpx2.HTTPError, StopIteration):
            self._fail(self._why_gone())

    def get(self, path: str) -> dict[str, Any]:
        with self.client() as client:
            return client.get(path).raise_for_status().json()

    def client(self, timeout: float | None = None) -> httpx2.Client:
        """Of the whole time that is left, if no other timeout is given."""
        left = max(0.001, self.deadline - time.monotonic())
        return httpx2.Client(
            base_url=HOST, transport=httpx2.HTTPTransport(uds=str(self.socket)), timeout=min(left, timeout or left)
        )

    def _why_gone(self) -> str:
        try:
            code = self.process.wait(10)
        except TimeoutExpired:
            return "it broke off its answer"
        return vllm_process.cause_of(self.log, code)

    def _check_time(self, what: str) -> None:
        if time.monotonic() > self.deadline:
            self.late(what)

    def late(self, what: str) -> NoReturn:
        raise UserError(
            f"smoke.timeout_seconds: vLLM {what} after {self.seconds:g} s; allow more, or ask less (smoke.prompts, "
            f"smoke.max_new_tokens); its log is {vllm_process.keep_log(self.log, 'smoke')}"
        )

    def _fail(self, cause: str) -> NoReturn:
        raise UserError(f"smoke: vLLM failed: {cause}; its log is {vllm_process.keep_log(self.log, 'smoke')}")


@contextmanager
def server(model: Path, arguments: Sequence[str], *, seconds: float) -> Iterator[Server]:
    """A Server that imports; `open` lets it load. Nothing of it stays behind."""
    with tempfile.TemporaryDirectory(prefix="controlllm-smoke-") as scratch:
        socket, log = Path(scratch, "socket"), Path(scratch, "server.log")
        if len(str(socket).encode()) > SOCKET_PATH:
            raise UserError(f"smoke: {socket} is too long for the name of a socket; set TMPDIR to a shorter folder")
        own = ["--uds", str(socket), "--served-model-name", NAME, "--disable-uvicorn-access-log"]
        command = [vllm_process.python(), "-m", "controlllm.vllm_server", "--attached", str(model), *own, *arguments]
        with log.open("wb") as stream:
            process = vllm_process.start(command, environment=ENVIRONMENT | DEVELOPMENT, log=stream)
        try:
            yield Server(process, socket, log, seconds)
        finally:
            vllm_process.end(process)
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()


DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1"}
"""Lets the test ask what the engine's processes hold (`EngineFacts`); nobody else reaches the socket."""


def greedy_answers(found: Mapping[str, Any]) -> list[Greedy]:
    """Of an answer of /v1/completions, in the order of the prompts."""
    return [_greedy(choice) for choice in sorted(found["choices"], key=lambda choice: choice["index"])]


def _greedy(choice: Mapping[str, Any]) -> Greedy:
    chances = choice["logprobs"]
    likely = [
        sorted(((int(name.removeprefix("token_id:")), value) for name, value in place.items()), key=lambda one: -one[1])
        for place in chances["top_logprobs"]
    ]
    return Greedy(choice["token_ids"], chances["token_logprobs"], likely, choice["finish_reason"])


def _said(answer: httpx2.Response) -> str:
    try:
        found = answer.json()
    except json.JSONDecodeError:
        return answer.text[:300]
    return str((found.get("error") or {}).get("message", found))[:300]
