"""vLLM's OpenAI server on a checkpoint, in a process that ends with this one, however this one ends."""

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from controlllm import vllm_process
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.serving import Serving, check, command, environment, greeting, url

PATIENCE = 30.0
"""Seconds that a server has to end after it was told to."""


def serve(serving: Serving) -> int:
    """The exit code of the server, which runs until SIGTERM or Ctrl-C. UserError when it does not come up."""
    check(serving)
    with tempfile.TemporaryDirectory(prefix="controlllm-serve-") as scratch:
        log = Path(scratch, "server.log")
        with log.open("wb") as lines:
            process = vllm_process.start(
                command(serving, attached=True),
                environment=environment(),
                log=lines,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        try:
            with _signals(process) as stopped:
                return _run(process, serving, log, stopped)
        finally:
            vllm_process.end(process)


def _run(process: "subprocess.Popen[str]", serving: Serving, log: Path, stopped: threading.Event) -> int:
    """Let it load, say when it is ready, wait for its end."""
    assert process.stdin is not None
    ready = threading.Event()
    listener = threading.Thread(target=_listen, args=(process, log, ready), daemon=True)
    listener.start()
    with suppress(BrokenPipeError):  # it has ended: its log says why
        process.stdin.write("\n")
        process.stdin.flush()
    with console.status(f"  vLLM loads {serving.name}"):
        while process.poll() is None and not _healthy(serving):
            time.sleep(0.2)
    if process.poll() is None and not stopped.is_set():
        ready.set()
        print(greeting(serving), flush=True)
    code = process.wait()
    vllm_process.kill(process)  # what it started holds its stdout open, which the listener reads to the end
    listener.join()
    if not ready.is_set() and code != 0 and not stopped.is_set():
        kept = vllm_process.keep_log(log, "serve")
        raise UserError(f"serve: vLLM failed: {vllm_process.cause_of(log, code)}; its log is {kept}")
    return code if code >= 0 else 128 - code  # as shells have it for a signal


def _listen(process: "subprocess.Popen[str]", log: Path, ready: threading.Event) -> None:
    """What it says goes on to stderr; on a terminal not before it is ready, but into the log."""
    assert process.stdout is not None
    with log.open("a") as lines:
        for line in process.stdout:
            if not ready.is_set():
                lines.write(line)
                lines.flush()
            if ready.is_set() or not console.is_terminal:
                sys.stderr.write(line)
                sys.stderr.flush()


def _healthy(serving: Serving) -> bool:
    import httpx2

    try:
        with httpx2.Client(trust_env=False, verify=False, timeout=5) as client:
            return client.get(f"{url(serving)}/health").is_success
    except httpx2.TransportError:
        return False


@contextmanager
def _signals(process: "subprocess.Popen[str]") -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C end the server, which answers no more; the second one, or patience, kills it."""
    stopped = threading.Event()

    def stop(number: int, frame: Any) -> None:
        if stopped.is_set():
            vllm_process.kill(process)
            return
        stopped.set()
        process.terminate()
        timer = threading.Timer(PATIENCE, vllm_process.kill, args=(process,))
        timer.daemon = True
        timer.start()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
