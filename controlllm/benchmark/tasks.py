"""From the names in a recipe to tasks: probes, suites, and single tasks of a suite."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

from controlllm.benchmark.probe_tasks import probe_task
from controlllm.benchmark.task import Task
from controlllm.config import BenchmarkConfig
from controlllm.data.probes import PROBES, probe_names
from controlllm.errors import UserError

OFFLINE = [
    "mmlu-dev", "prose", "python", "chat", "gsm", "bigbench-social", "bigbench-strategy", "bigbench-deduction",
]  # fmt: skip
"""The suite `offline`: probes, whose items come from packages."""


def known_names() -> list[str]:
    """Everything that `benchmark.new` and `benchmark.old` may hold."""
    from controlllm.benchmark.suites import suite_names
    from controlllm.benchmark.suites import task_names as suite_task_names

    return list(dict.fromkeys([*probe_names(), *suite_names(), *suite_task_names()]))


def single_names() -> list[str]:
    """The same without suites: what `benchmark.items` may count by name."""
    from controlllm.benchmark.suites import task_names as suite_task_names

    return list(dict.fromkeys([*probe_names(), *suite_task_names()]))


def probes_of(config: BenchmarkConfig) -> list[str]:
    """The probes among the names, those of a suite included: what ingest has to make items for."""
    return list(dict.fromkeys(probe for name in (*config.new, *config.old) for probe in probes_in(name)))


def probes_in(name: str) -> list[str]:
    """The probes that a name stands for; none for a suite of lm-eval's tasks."""
    if name in PROBES:
        return [name]
    return OFFLINE if name == "offline" else []


def code_tasks(name: str) -> list[str]:
    """Those that run what the model writes."""
    return [] if probes_in(name) else [task.name for task in _suite(name) if task.kind == "code"]


def suite_tasks_of(config: BenchmarkConfig) -> list[Task]:
    """Those of lm-eval, each once; they ask the same whatever the prompts are."""
    data = Path(config.data) if config.data else None
    names = [name for name in (*config.new, *config.old) if not probes_in(name)]
    return list({task.name: task for name in names for task in _suite(name, data=data)}.values())


def roles_and_names(config: BenchmarkConfig) -> list[str]:
    """What a gate may name: new, old, and every suite and task that is measured."""
    names = ["new", "old"]
    for name in (*config.new, *config.old):
        names += [name, *(probes_in(name) or [task.name for task in _suite(name)])]
    return list(dict.fromkeys(names))


def tasks_of(config: BenchmarkConfig, *, model: Path, data: Path | None) -> list[Task]:
    """Each task once, in the recipe's order. UserError for a probe without items, or code that may not run."""
    prompts = config.prompts or ("instruct" if has_chat_template(model) else "pretrain")
    tasks: dict[str, Task] = {}
    for name in (*config.new, *config.old):
        for task in _named(name, config, prompts, data):
            tasks.setdefault(task.name, task)
    if code := [task.name for task in tasks.values() if task.kind == "code" and not config.run_code]:
        raise UserError(
            f"benchmark: {', '.join(code)} runs programs that the model writes; allow it with benchmark.run_code=true "
            "(--run-code), which runs them in a sandbox, or leave it out"
        )
    return list(tasks.values())


def has_chat_template(model: Path) -> bool:
    """Whether the folder's tokenizer knows how a chat is written."""
    if (model / "chat_template.jinja").is_file():
        return True
    file = model / "tokenizer_config.json"
    return file.is_file() and bool(json.loads(file.read_text()).get("chat_template"))


def listed() -> list[tuple[str, str, str]]:
    """(suite, name, title) of everything that can be measured."""
    from controlllm.benchmark.suites import suite_names

    rows = [("probes", name, PROBES[name].title) for name in probe_names()]
    rows += [("offline", name, PROBES[name].title) for name in OFFLINE]
    for suite in suite_names():
        rows += [(suite, task.name, task.title) for task in _suite(suite)] if not probes_in(suite) else []
    return rows


def _named(
    name: str, config: BenchmarkConfig, prompts: Literal["instruct", "pretrain"], data: Path | None
) -> list[Task]:
    if probes := probes_in(name):
        if data is None:
            raise UserError(f"benchmark: {name} needs items that ingest makes; run it with a recipe")
        return [probe_task(probe, data) for probe in probes]
    found = _suite(name, prompts, Path(config.data) if config.data else None)
    return [_limited(task, config.items_of(task.name)) for task in found]


def _limited(task: Task, limit: int | None) -> Task:
    """Of groups, whose subtasks are limited each, the number of items is not known."""
    return replace(task, limit=limit, items=limit if len(task.harness) == 1 else None)


def _suite(name: str, prompts: Literal["instruct", "pretrain"] = "instruct", data: Path | None = None) -> list[Task]:
    from controlllm.benchmark.suites import suite_tasks

    return suite_tasks([name], prompts=prompts, data=data)
