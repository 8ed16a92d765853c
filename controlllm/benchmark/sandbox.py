"""Runs programs that a model wrote: nothing of this machine can be read, changed, reached or kept busy by them.

Each runs in a process of its own, as nobody (or with no rights at all), with an empty environment, no network, no
second process or thread, a read-only view of what Python needs, and limits on time, memory and files.
"""

import functools
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from controlllm.benchmark.sandbox_calls import calls
from controlllm.errors import UserError

Walls = Literal["namespaces", "landlock"]
"""How files are kept away; the filter of system calls, limits and rights are the same."""
TIMEOUT, MEMORY = 10.0, 1 << 30
CHILD = Path(__file__).with_name("sandbox_child.py")
FLAGS = ["-s", "-S", "-P", "-B", "-X", "utf8"]  # no site-packages, no folder of the script, no bytecode
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}  # the same order of sets every time
FILES = 1 << 24  # bytes that a program may write
KILLED = 64  # as in the child
PACKAGES = ("numpy",)  # the extended tests import it
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Outcome:
    """How a program ended; the reason (empty where it passed) may hold any text that the program chose."""

    passed: bool
    reason: str = ""


class NoWalls(UserError):
    """The walls could not be built: nothing ran."""


def run(program: str, *, timeout: float = TIMEOUT, memory: int = MEMORY, inside: Walls | None = None) -> Outcome:
    """Passed: the program came to its end without an exception.

    timeout: seconds of computing, and a third of the seconds that it may take in all; memory: bytes of address space.
    inside: the walls, `walls()` when left out. NoWalls (one line) where it cannot be isolated here.
    """
    return _run(program, timeout=timeout, memory=memory, inside=inside or walls())


def run_all(
    programs: Sequence[str],
    *,
    workers: int | None = None,
    timeout: float = TIMEOUT,
    memory: int = MEMORY,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Outcome]:
    """Outcomes in the programs' order; `workers` at a time, one per core when left out."""
    outcomes, inside = [], walls()
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))
    try:
        one = functools.partial(_run, timeout=timeout, memory=memory, inside=inside)
        for outcome in pool.map(one, programs):
            outcomes.append(outcome)
            advance(len(outcomes))
    finally:
        pool.shutdown(cancel_futures=True)
    return outcomes


@functools.cache
def walls() -> Walls:
    """The first walls that stand here: tried once, by a program that leans against them. NoWalls if none does."""
    if sys.platform != "linux":
        raise NoWalls("benchmark.run_code: programs are isolated by Linux; on other systems leave the code tasks out")
    said = []
    for inside in ("namespaces", "landlock"):
        try:
            outcome = _run(_leaning(), timeout=TIMEOUT, memory=MEMORY, inside=inside)
        except NoWalls as error:
            said.append(str(error))
            continue
        if outcome.passed:
            return inside
        said.append(f"{inside}: {outcome.reason}")
    raise NoWalls(
        f"benchmark.run_code: programs cannot be isolated here ({'; '.join(said)}); allow user namespaces or use a "
        "kernel with Landlock (5.13), or leave the code tasks out"
    )


def _leaning() -> str:
    """Imports what tests import, and passes only where this file cannot be opened and no socket be made."""
    packages = "".join(f"import {name}\n" for name in _packages())
    return (
        f"import ctypes, decimal, hashlib, json, random, socket\n{packages}"
        f"for act in (lambda: open({str(CHILD)!r}), socket.socket):\n"
        "    try:\n        act()\n    except OSError:\n        continue\n"
        "    raise RuntimeError('the walls have a hole')\n"
    )


def _run(program: str, *, timeout: float, memory: int, inside: Walls) -> Outcome:
    nonce, (read, write) = secrets.token_hex(16), os.pipe()
    with TemporaryFile() as spec, TemporaryFile() as result, TemporaryFile() as errors, open(os.devnull, "r+b") as null:
        os.write(write, nonce.encode())
        os.close(write)
        try:
            open_files = {"nonce": read, "null": null.fileno()}
            limits = {"cpu": ceil(timeout), "memory": memory, "disk": FILES}
            asked = open_files | limits | _places() | {"walls": inside, "program": program}
            spec.write(json.dumps(asked).encode())
            spec.seek(0)
            passed_on = tuple(open_files.values())
            code = _ended(timeout * 3, stdin=spec, stdout=result, stderr=errors, pass_fds=passed_on)
        finally:
            os.close(read)
        said, wrong = (_first(file) for file in (result, errors))
    if code == 0 and said == nonce:
        return Outcome(True)
    if code == 0:
        return Outcome(False, _line(said) or "ended before its last line")
    if code in (None, KILLED + signal.SIGKILL, KILLED + signal.SIGXCPU):
        return Outcome(False, "timeout")
    if code > KILLED:
        return Outcome(False, signal.Signals(code - KILLED).name)
    raise NoWalls(f"{inside}: {_line((wrong.splitlines() or [f'exit code {code}'])[-1])}")


def _ended(seconds: float, **files: Any) -> int | None:
    """The exit code, None when time was up. Nothing of the process is left."""
    process = subprocess.Popen(  # noqa: S603 - that is what this file is for
        [sys.executable, *FLAGS, str(CHILD)], env=ENVIRONMENT, cwd="/", start_new_session=True, **files
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _first(file: Any) -> str:
    file.seek(0)
    return file.read(4096).decode(errors="replace")


def _line(text: str) -> str:
    """One line that no terminal reads as a command."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]


@functools.cache
def _places() -> dict[str, Any]:
    """What a program may read and call. NoWalls for a processor whose system calls are not listed."""
    try:
        allowed = calls()
    except KeyError as error:
        raise NoWalls(f"benchmark.run_code: there is no list of system calls for {error}") from None
    packages = _packages()
    wanted = {
        *SYSTEM,
        f"{sys.base_prefix}/lib",
        *packages.values(),
        *(f"{folder}.libs" for folder in packages.values()),
    }
    there = sorted({each for path in wanted for each in (path, os.path.realpath(path)) if os.path.exists(each)})
    view = [path for path in there if not any(path.startswith(f"{other}/") for other in there)]
    return {"view": view, "packages": packages, "calls": allowed}


def _packages() -> dict[str, str]:
    found = {name: importlib.util.find_spec(name) for name in PACKAGES}
    return {name: str(Path(spec.origin).parent) for name, spec in found.items() if spec and spec.origin}
