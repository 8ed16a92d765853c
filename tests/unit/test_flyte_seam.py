"""Another orchestrator would touch tasks/ and workflows/ only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ELSEWHERE = sorted(file for folder in ("controlllm", "bench") for file in (ROOT / folder).rglob("*.py"))
TASKS = sorted(file for file in (ROOT / "tasks").glob("*.py") if file.name != "__init__.py")
FLYTE = ("flytekit", "flytekitplugins", "flyteidl", "flyte")


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of all that a module imports, inside functions, too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_nothing_but_tasks_and_workflows_imports_flyte():
    assert len(ELSEWHERE) > 200
    knows = [file.name for file in ELSEWHERE if imported(ast.parse(file.read_text())) & set(FLYTE)]
    assert knows == []


@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.stem)
def test_a_task_is_a_call_and_not_logic(file):
    """No loop and no more than a dozen statements: what a task does can be done without Flyte."""
    tasks = [f for f in ast.parse(file.read_text()).body if isinstance(f, ast.FunctionDef) and _is_task(f)]
    for task in tasks:
        statements = [node for node in ast.walk(task) if isinstance(node, ast.stmt)][1:]
        assert len(statements) <= 12, f"{task.name} has {len(statements)} statements"
        assert not any(isinstance(node, ast.For | ast.While | ast.Try) for node in statements), task.name


def _is_task(function: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Call) and getattr(d.func, "id", "") == "task" for d in function.decorator_list)
