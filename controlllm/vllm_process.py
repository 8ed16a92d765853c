"""The process around a vLLM engine, seen from its caller: how it starts, what its log says, and its end."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from controlllm.fingerprint import PACKAGE

PYTHON = "CONTROLLLM_VLLM_PYTHON"
"""In the environment: a Python that has vLLM, where this one has not."""


def start(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: IO[bytes],
    stdout: int | None = None,
    stderr: int | None = None,
) -> "subprocess.Popen[str]":
    """`command` (a Python, -m, a module of this package) in a process group of its own, with a pipe for stdin.

    What it says goes to the log, unless stdout or stderr are given. The process must end itself when its stdin does:
    then its caller is gone.
    """
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(  # noqa: S603 - a Python, and names of this package
        command,
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=log if stdout is None else stdout,
        stderr=log if stderr is None else stderr,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def python() -> str:
    """The interpreter that has vLLM: this one, if no other is named."""
    return os.environ.get(PYTHON) or sys.executable


def is_installed() -> bool:
    """Whether there is a vLLM to start, as far as can be told without starting it."""
    return bool(os.environ.get(PYTHON)) or importlib.util.find_spec("vllm") is not None


def end(process: "subprocess.Popen[Any]") -> None:
    """Kill it and all that it started."""
    kill(process)
    process.wait()


def kill(process: "subprocess.Popen[Any]") -> None:
    """As `end`, without waiting: also where something else waits for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def keep_log(file: Path, stage: str) -> str:
    """The path of a copy that outlives the stage."""
    handle, kept = tempfile.mkstemp(prefix=f"controlllm-{stage}-", suffix=file.suffix)
    os.close(handle)
    shutil.copyfile(file, kept)
    return kept


_WAYS_OUT = (
    (
        re.compile(r"max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed.*?memory \(([\d.]+) GiB\)"),
        "a text of {0} tokens needs {1} GiB of KV cache, and there are {2} GiB: set --max-model-len lower, or give "
        "more with --kv-cache-memory-bytes",
    ),
    (
        re.compile(r"No available memory for the cache blocks"),
        "the weights leave no memory for a KV cache: use a smaller --dtype, more --tensor-parallel, or "
        "a larger machine",
    ),
    (
        re.compile(r"OutOfMemoryError|can't allocate memory|Cannot allocate memory|\bMemoryError|std::bad_alloc"),
        "there is too little memory for the weights and the KV cache: use a smaller --dtype, --max-model-len or "
        "--kv-cache-memory-bytes, or more --tensor-parallel",
    ),
)
"""What vLLM says at length, and what to do about it."""


# What vLLM puts before a line of its log, and what it says when the reason stands elsewhere in it.
_PREFIX = re.compile(
    r"^(\((APIServer|EngineCore|Worker)\w* pid=\d+\) |\[rank\d+\]: |[A-Z]+ [\d-]+ [\d:]+ \[[\w.]+:\d+\] )*"
)
_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")
_ELSEWHERE = ("Engine core initialization failed", "Worker failed with error", "WorkerProc initialization failed")


def cause_of(log: Path, code: int) -> str:
    """Why the process ended with this code: the last error in its log that says so, in one line."""
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}, which is often too little memory"
    lines = [_PREFIX.sub("", line.strip()) for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [n for n, line in enumerate(lines) if _ERROR.match(line)]
    if not errors:
        return lines[-1] if lines else f"exit code {code}, without a word"
    told = [n for n in errors if not any(words in lines[n] for words in _ELSEWHERE)] or errors
    last = told[-1]
    # A validation error says on the next line what is wrong.
    return _with_way_out(" ".join(lines[last : last + 2]) if "validation error" in lines[last] else lines[last])


def _with_way_out(error: str) -> str:
    for pattern, said in _WAYS_OUT:
        if found := pattern.search(error):
            return said.format(*found.groups())
    return error
