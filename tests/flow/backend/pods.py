"""Pods as processes: a packaged task's container arguments, inputs.pb in, outputs.pb or error.pb out.

A PyTorchJob is several such processes, with the variables that the training operator gives them.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flyteidl.core import errors_pb2, literals_pb2
from google.protobuf.json_format import MessageToDict

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
"""As in an image, where Flyte's programs are found by name."""

GRACE_SECONDS = 20


@dataclass
class Attempt:
    """One try of one task: its pods and where they write."""

    task: Any
    folder: Path
    names: Mapping[str, str]
    """Variables that say which execution this is."""
    variables: Mapping[str, str]
    """Those of the execution, over the container's own."""
    previous_checkpoint: str = ""
    pods: list[subprocess.Popen[bytes]] = field(default_factory=list)


@dataclass(frozen=True)
class Ended:
    """What came out: outputs, or what was wrong and whether another try may help."""

    outputs: literals_pb2.LiteralMap | None
    error: str = ""
    recoverable: bool = False
    deck: Path | None = None


def run(attempt: Attempt, inputs: literals_pb2.LiteralMap) -> Ended:
    """Start the pods, wait for all of them, read what they wrote."""
    for name in ("out", "raw", "checkpoint", "work"):
        (attempt.folder / name).mkdir(parents=True)
    (attempt.folder / "inputs.pb").write_bytes(inputs.SerializeToString())
    nodes = _nodes(attempt.task)
    port = _free_port()
    for rank in range(nodes):
        attempt.pods.append(_start(attempt, rank, nodes, port))
    codes = _wait(attempt.pods)
    return _read(attempt, codes)


def stop(attempt: Attempt) -> None:
    """As Kubernetes: SIGTERM, and SIGKILL to what is still there later."""
    for pod in attempt.pods:
        _signal(pod, signal.SIGTERM)
    until = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < until and any(pod.poll() is None for pod in attempt.pods):
        time.sleep(0.1)
    for pod in attempt.pods:
        _signal(pod, signal.SIGKILL)


def kill(pod: subprocess.Popen[bytes]) -> None:
    """A lost machine: the pod and all its processes at once."""
    _signal(pod, signal.SIGKILL)


def _signal(pod: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if pod.poll() is None:
        os.killpg(pod.pid, number)


def _start(attempt: Attempt, rank: int, nodes: int, port: int) -> subprocess.Popen[bytes]:
    arguments, environment = container(attempt.task)
    out = attempt.folder / "out"
    given = {
        "{{.input}}": str(attempt.folder / "inputs.pb"),
        "{{.outputPrefix}}": str(out),
        "{{.rawOutputDataPrefix}}": str(attempt.folder / "raw"),
        "{{.checkpointOutputPrefix}}": str(attempt.folder / "checkpoint"),
        "{{.prevCheckpointPrefix}}": attempt.previous_checkpoint or '""',
    }
    work = attempt.folder / "work" / str(rank)
    work.mkdir()
    names = {**attempt.names, "FLYTE_INTERNAL_WORKER_NAME": f"worker-{rank}"}
    if nodes > 1:
        names |= {
            "PET_NNODES": f"{nodes}:{nodes}",
            "PET_NPROC_PER_NODE": str(_elastic(attempt.task)["nprocPerNode"]),
            "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}",
            "PET_MAX_RESTARTS": str(_elastic(attempt.task).get("maxRestarts", 0)),
            "PET_NODE_RANK": str(rank),
            "FLYTE_INTERNAL_DIST_ERROR_STRATEGY": "Earliest",
            "FLYTE_FAIL_ON_ERROR": "true",
        }
    log = (attempt.folder / f"pod-{rank}.log").open("wb")
    return subprocess.Popen(
        [given.get(each, each) for each in arguments],
        cwd=work,
        env={**os.environ, "PATH": PATH, "TMPDIR": str(work), **environment, **attempt.variables, **names},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def container(task: Any) -> tuple[list[str], dict[str, str]]:
    """Arguments and plain variables of the container that runs a task."""
    if task.WhichOneof("target") == "container":
        return list(task.container.args), {pair.key: pair.value for pair in task.container.env}
    name = task.config.get("primary_container_name", "primary")
    spec = MessageToDict(task.k8s_pod.pod_spec)
    found = next(each for each in spec["containers"] if each["name"] == name)
    environment = {each["name"]: each["value"] for each in found.get("env", []) if "value" in each}
    return [*found.get("command", []), *found["args"]], environment


def _nodes(task: Any) -> int:
    if task.type != "pytorch":
        return 1
    return int(MessageToDict(task.custom)["workerReplicas"]["replicas"])


def _elastic(task: Any) -> dict[str, Any]:
    return MessageToDict(task.custom)["elasticConfig"]


def _wait(pods: list[subprocess.Popen[bytes]]) -> list[int]:
    """Until all have ended; a job whose pod failed takes the others away."""
    while any(pod.poll() is None for pod in pods):
        if any(pod.poll() not in (None, 0) for pod in pods):
            _take_away(pods)
        time.sleep(0.05)
    return [pod.wait() for pod in pods]


def _take_away(pods: list[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + GRACE_SECONDS
    for pod in pods:
        _signal(pod, signal.SIGTERM)
    while time.monotonic() < until and any(pod.poll() is None for pod in pods):
        time.sleep(0.05)
    for pod in pods:
        _signal(pod, signal.SIGKILL)


def _read(attempt: Attempt, codes: list[int]) -> Ended:
    out = attempt.folder / "out"
    deck = out / "deck.html" if (out / "deck.html").exists() else None
    errors = [errors_pb2.ErrorDocument.FromString(file.read_bytes()).error for file in sorted(out.glob("error*.pb"))]
    if errors:
        first = min(errors, key=lambda each: (each.timestamp.seconds, each.timestamp.nanos))
        return Ended(None, first.message, first.kind == errors_pb2.ContainerError.RECOVERABLE, deck)
    if any(codes):
        where = ", ".join(f"pod {rank} ended with {code}" for rank, code in enumerate(codes) if code)
        return Ended(None, f"{where}\n{_last_lines(attempt)}", recoverable=True, deck=deck)
    if not (out / "outputs.pb").exists():
        return Ended(None, f"outputs.pb was not written\n{_last_lines(attempt)}", recoverable=True, deck=deck)
    return Ended(literals_pb2.LiteralMap.FromString((out / "outputs.pb").read_bytes()), deck=deck)


def _last_lines(attempt: Attempt) -> str:
    return "\n".join(log.read_text(errors="replace")[-1500:] for log in sorted(attempt.folder.glob("pod-*.log")))


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
