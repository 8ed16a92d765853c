"""The other end of `controlllm.benchmark.workers`: `python -m controlllm.benchmark.worker ENGINE ARGUMENTS`."""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

Line = dict[str, Any]


def main(engine: str, arguments: str) -> None:
    """Serve until the caller is gone. What libraries print goes to the log, with the errors."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    inbox: queue.Queue[Line] = queue.Queue()
    threading.Thread(target=_read, args=(inbox,), daemon=True).start()
    serve = import_module(f"controlllm.benchmark.{engine}_worker").serve
    serve(inbox, _writer(answers), **json.loads(arguments))


def _writer(stream: Any) -> Callable[[Line, list[Any]], None]:
    def send(line: Line, answers: list[Any]) -> None:
        kind = "pairs" if "pairs" in line else "prompts"
        stream.write(json.dumps({"batch": line["batch"], kind: len(answers), "answers": answers}) + "\n")
        stream.flush()

    return send


def _read(inbox: "queue.Queue[Line]") -> None:
    """The caller holds stdin open for as long as it lives."""
    for line in sys.stdin:
        inbox.put(json.loads(line))
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
