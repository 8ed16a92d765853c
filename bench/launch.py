"""A bench again in processes of its own, which join into one gloo group; each answers with a line of JSON."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def in_processes(size: int, *arguments: str, **environment: str) -> list[Any]:
    """What each of `size` processes printed last: this script with its own arguments and these; SystemExit if one
    failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1",
        # What is freed goes back at once, so that the resident set's peak is one.
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    } | environment  # fmt: skip
    command = [sys.executable, *sys.argv, *arguments]
    children = [
        subprocess.Popen(  # noqa: S603
            command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(size)
    ]
    answers = [process.communicate()[0] for process in children]
    if any(process.returncode for process in children):
        raise SystemExit(f"{' '.join(arguments)}: a process failed")
    return [json.loads(answer.decode().splitlines()[-1]) for answer in answers]


def reset_peak() -> None:
    """From now on `peak_resident` counts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """Bytes of this process, at most since it began or since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
