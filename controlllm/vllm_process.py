"""The process around a vLLM engine, seen from its caller: how it starts, what its log says, and its end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from controlllm.fingerprint import PACKAGE

PYTHON = "CONTROLLLM_VLLM_PYTHON"
"""In the environment: a Python that has vLLM, where this one has not."""


def start(
    command: Sequence[str], *, environment: Mapping[str, str], log: IO[bytes], stdout: int | None = None
) -> "subprocess.Popen[str]":
    """`command` (a Python, -m, a module of this package) in a process group of its own, with a pipe for stdin.

    Its errors go to the log, and its stdout, too, unless it is given. The process must end itself when its stdin does:
    then its caller is gone.
    """
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(  # noqa: S603 - a Python, and names of this package
        command,
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=log if stdout is None else stdout,
        stderr=log,
        text=True,
        start_new_session=True,
    )


def python() -> str:
    """The interpreter that has vLLM: this one, if no other is named."""
    return os.environ.get(PYTHON) or sys.executable


def end(process: "subprocess.Popen[Any]") -> None:
    """Kill it and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def keep_log(log: Path, stage: str) -> str:
    """The path of a copy that outlives the stage."""
    handle, kept = tempfile.mkstemp(prefix=f"controlllm-{stage}-", suffix=".log")
    os.close(handle)
    shutil.copyfile(log, kept)
    return kept


def cause_of(log: Path, code: int) -> str:
    """The last error in the log, without vLLM's prefixes."""
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}, which is often too little memory"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # A validation error of vLLM says on the next line what is wrong.
    following = dict(pairwise(lines))
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    if not errors:
        return lines[-1] if lines else f"exit code {code}, without a word"
    last = errors[-1]
    return f"{last} {following[last]}" if "validation error" in last and last in following else last
