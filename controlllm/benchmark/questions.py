"""What the suites ask: a mix must not hold it."""

from collections.abc import Iterator
from typing import Any

from controlllm.benchmark.tasks import suite_tasks_of
from controlllm.config import BenchmarkConfig
from controlllm.errors import UserError, one_line
from controlllm.progress import track

SHORTEST = 20
"""Characters: shorter texts of an item are labels, names and bare answers."""


def suite_questions(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """{"prompt": text} for the texts of every item that the suites measure, whatever `benchmark.items` says.

    UserError where a task's items cannot be had: better before training than after it.
    """
    tasks = suite_tasks_of(config)
    if not tasks:
        return []
    from controlllm.benchmark.suites import load

    found: dict[str, None] = {}
    with track("items of the suites", total=len(tasks), unit="tasks") as advance:
        for number, task in enumerate(tasks, start=1):
            try:
                loaded = load(task)
            except Exception as error:  # the Hub's client and lm-eval raise anything
                raise UserError(
                    f"benchmark: the items of {task.name} cannot be had, neither to measure nor to leave out of the "
                    f"training data: {one_line(error)}"
                ) from error
            found |= dict.fromkeys(text for each in loaded["tasks"].values() for text in _texts(each))
            advance(number, task.name)
    return [{"prompt": text} for text in found]


def _texts(task: Any) -> Iterator[str]:
    """The question, and what else an item says at length: passage, solution. Choices are said elsewhere, too."""
    for doc in task.eval_docs:
        yield from (text for text in doc.values() if isinstance(text, str) and len(text) >= SHORTEST)
