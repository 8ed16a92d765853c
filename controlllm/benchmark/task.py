"""What is measured: one task, as lm-evaluation-harness loads it and as a person reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["generate", "choice", "loss", "text", "drift", "code"]
Metric = Literal["loss", "accuracy", "exact_match", "pass", "score"]
GENERATES: tuple[Kind, ...] = ("generate", "code")
"""Kinds whose answers are written token by token; of the others the model only scores what it is given."""
PROBES = "probes"
"""The suite of what ingest makes: items that need no network."""


@dataclass(frozen=True)
class Task:
    """Everything that decides a task's score, but for the model.

    `harness` is what lm-eval's TaskManager loads: names of its tasks or groups, or task files as dicts; several are one
    task (MMLU's 57 subtasks). Of the metrics that lm-eval computes for an item, `measure` after `filter` counts.
    """

    name: str
    title: str
    suite: str
    kind: Kind
    harness: tuple[Any, ...]
    measure: str
    filter: str = "none"
    shots: int | None = None
    """Examples before the question; the harness task's own number when None."""
    chat: bool = False
    """Whether the tokenizer's chat template is applied."""
    limit: int | None = None
    """Items, of each subtask; all when None."""
    include: Path | None = None
    """A folder of task files that `harness` names."""
    items: int | None = None
    """How many there are, where that is known before they are loaded."""
    data: str | None = None
    """What the items are, where `harness` does not say: a hash of their file, or of a folder of datasets."""

    @property
    def metric(self) -> Metric:
        """The word for what `measure` says of an item."""
        if self.kind == "choice":
            return "accuracy"
        if self.kind == "code":
            return "pass"
        return "exact_match" if self.kind == "generate" else "loss"
