"""The tasks of lm-evaluation-harness behind one of ours: only its folder is read, and its data may lie in a folder."""

import random
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

from controlllm.benchmark.suites.listed import needs_of
from controlllm.benchmark.suites.needs import require
from controlllm.benchmark.suites.source import Source, splits_of
from controlllm.benchmark.task import Task
from controlllm.errors import UserError

Loaded = dict[str, Any]
Changes = dict[str, Any]
SEED = 0
"""GPQA's choices are shuffled by Python's global generator: both models must see the same order."""


def load(task: Task) -> Loaded:
    """{"tasks": {name: lm-eval's task}}, every one with its data.

    UserError where data or a package is missing, or lm-eval has no such task.
    """
    require(task.name, needs_of(task.name))
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=str(task.include))
    index = manager.task_index
    members = [member for given in task.harness for member in _members(task, index, given)]
    state = random.getstate()
    try:
        random.seed(SEED)
        loaded = manager.load([{"group": task.name, "task": members}])["tasks"]
        for each in loaded.values():
            random.seed(SEED)
            _keep_docs(each)
    finally:
        random.setstate(state)
    return {"tasks": loaded}


def _members(task: Task, index: Mapping[str, Any], given: Changes) -> Iterator[Changes]:
    """What a name of ours stands for, each with its changes and where its data are."""
    folder = given.get("dataset_kwargs", {}).get("folder")
    changes = {key: value for key, value in given.items() if key not in ("task", "dataset_kwargs")}
    for name in _leaves(task, index, given["task"]):
        config = index[name].cfg
        member = {"task": name} | changes
        if "generation_kwargs" in changes:
            member["generation_kwargs"] = config.get("generation_kwargs", {}) | changes["generation_kwargs"]
        path, subset, kwargs = config["dataset_path"], config.get("dataset_name"), config.get("dataset_kwargs", {})
        kwargs = {key: value for key, value in kwargs.items() if key != "trust_remote_code"}
        yield member | {
            "custom_dataset": Source(path, subset, folder, splits_of(config), kwargs),
            "dataset_kwargs": None,
        }


def _leaves(task: Task, index: Mapping[str, Any], given: str | Changes) -> Iterator[str]:
    """The names of single tasks behind a task, group or tag, or a group that is written out within another."""
    if isinstance(given, dict) and "group" in given:
        for member in given["task"]:
            yield from _leaves(task, index, member)
        return
    name = given["task"] if isinstance(given, dict) else given
    if name not in index:
        raise UserError(f"{task.name}: lm-eval has no task '{name}' in {task.include}; install lm-eval 0.4.13")
    entry = index[name]
    if entry.kind.name == "TAG":
        yield from sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        for member in entry.cfg["task"]:
            yield from _leaves(task, index, member)
    else:
        yield name


def _keep_docs(task: Any) -> None:
    """Process the items once: lm-eval does it at every look, and a shuffle of choices would differ each time."""
    if task.config.process_docs is None:
        return
    task.config.process_docs = _once(task.config.process_docs)
    list(task.eval_docs)


def _once(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    done: dict[int, tuple[Any, Any]] = {}

    @wraps(process)
    def kept(dataset: Any) -> Any:
        if id(dataset) not in done:
            done[id(dataset)] = (dataset, process(dataset))  # holding it keeps its id from being given again
        return done[id(dataset)][1]

    return kept
