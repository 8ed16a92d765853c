"""From `suites.yaml` and the code tasks to tasks."""

import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from controlllm.benchmark.task import Task
from controlllm.errors import UserError

HERE = Path(__file__).parent
Prompts = Literal["instruct", "pretrain"]
Entry = dict[str, Any]


def suite_names() -> list[str]:
    return [*_table(), "offline"]


def task_names() -> list[str]:
    """Every task of every suite."""
    return [name for tasks in _table().values() for name in tasks]


def suite_tasks(names: Iterable[str], *, prompts: str, data: Path | None) -> list[Task]:
    """The tasks of these suites, and single tasks; prompts: instruct or pretrain, data: a folder of datasets.

    UserError for a name that is neither.
    """
    if prompts not in ("instruct", "pretrain"):
        raise UserError(f"benchmark.prompts: '{prompts}' is not known; known: instruct, pretrain")
    return [_task(suite, name, prompts, data) for given in names for suite, name in _find(given)]


def needs_of(task: str) -> list[str]:
    """What a task needs besides lm-eval: modules, and NLTK's punkt_tab."""
    return next(tasks[task].get("needs", []) for tasks in _table().values() if task in tasks)


def _find(given: str) -> list[tuple[str, str]]:
    table = _table()
    if given in table:
        return [(given, name) for name in table[given]]
    if found := [(suite, given) for suite, tasks in table.items() if given in tasks]:
        return found
    raise UserError(f"benchmark: '{given}' is no suite and no task of one; suites: {', '.join(suite_names())}")


@cache
def _table() -> dict[str, dict[str, Entry]]:
    """{suite: {task: entry}}."""
    return yaml.safe_load((HERE / "suites.yaml").read_text(encoding="utf-8"))


def _task(suite: str, name: str, prompts: Any, data: Path | None) -> Task:
    entry = _table()[suite][name]
    entry = entry | entry.get(prompts, {})
    changes = _changes(entry)
    folder = {"dataset_kwargs": {"folder": str(data.absolute())}} if data else {}
    return Task(
        name=name,
        title=entry["title"],
        suite=suite,
        kind=entry["kind"],
        harness=tuple({"task": task} | changes | folder for task in entry["tasks"]),
        measure=entry["measure"],
        filter=entry.get("filter", "none"),
        shots=entry["shots"],
        chat=prompts == "instruct" and entry.get("chat", True),
        include=_include(entry["folder"]),
        data=_content(data, entry["data"]),
    )


def _changes(entry: Entry) -> Entry:
    """What is not as in lm-eval's own task."""
    changes = yaml.safe_load((HERE / entry["like"]).read_text(encoding="utf-8")) if "like" in entry else {}
    if "max_new_tokens" in entry:
        kwargs = changes.get("generation_kwargs", {}) | {"max_gen_toks": entry["max_new_tokens"]}
        changes = changes | {"generation_kwargs": kwargs}
    return changes


def _include(folder: str) -> Path:
    """A folder of this package, or of lm-eval's tasks; found without importing lm-eval."""
    if (ours := HERE.parent / folder).is_dir():
        return ours
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("benchmark: lm-eval is not installed; pip install lm-eval")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks" / folder


def _content(data: Path | None, datasets: Iterable[str]) -> str | None:
    """A hash of the datasets in the folder; what is missing is said when the task is loaded."""
    from controlllm.fingerprint import content_of
    from controlllm.store import content_hash

    if data is None:
        return None
    return content_of({name: content_hash(data / name) for name in datasets if (data / name).is_dir()})
