"""The model under test, loaded when a task first needs it and kept for the next one."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from controlllm.benchmark.task import Task
from controlllm.config import BenchmarkConfig
from controlllm.progress import Advance


class Models:
    """At most one backend's model at a time. A context manager: what was loaded ends with it."""

    def __init__(self, model: Path, config: BenchmarkConfig):
        self.model, self.config = model, config
        self._open: tuple[str, ExitStack, Any] | None = None
        self._advance: Advance = lambda done, note="": None

    def __enter__(self) -> "Models":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def backend(self, task: Task) -> str:
        """hf or vllm: for the same task the same for every model, so that two of them can be compared."""
        from controlllm.benchmark.lm import backend_of

        return backend_of(task.kind, self.config, self.model, task.items)

    def of(self, task: Task, advance: Advance) -> Any:
        """An lm_eval LM that runs the task; `advance` is told how many sequences of the task are done."""
        from controlllm.benchmark.lm import open_lm

        self._advance = advance
        backend = self.backend(task)
        if self._open is None or self._open[0] != backend:
            self.close()
            stack = ExitStack()
            lm = stack.enter_context(open_lm(self.model, self.config, backend, self._tell))
            self._open = (backend, stack, lm)
        lm = self._open[2]
        lm.done = 0
        return lm

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _tell(self, done: int, note: str = "") -> None:
        self._advance(done, note)
