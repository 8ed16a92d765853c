"""A model in transformers that answers batch after batch."""

import queue
from collections.abc import Callable
from typing import Any

from controlllm.benchmark.hf_engine import open_engine
from controlllm.benchmark.workers import requests_of


def serve(inbox: "queue.Queue[dict[str, Any]]", send: Callable[..., None], **arguments: Any) -> None:
    engine = open_engine(**arguments)
    while True:
        line = inbox.get()
        send(line, engine.answer(requests_of(line)))
