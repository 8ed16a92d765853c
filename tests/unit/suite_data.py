"""A few rows of every dataset that a suite reads, with the fields that the published ones have."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]
LETTERS = "ABCD"
MYSTERIES = ["murder_mysteries", "object_placements", "team_allocation"]
CATEGORIES = [
    "biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history", "law",
    "math", "other", "philosophy", "physics", "psychology",
]  # fmt: skip
MATH = [
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
]


def write_dataset(folder: Path, path: str, name: str | None) -> None:
    """The dataset `path`, and of it the configuration `name`, as jsonl files named by split."""
    for split, rows in _rows(path, name).items():
        file = folder / path / (name or "") / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _rows(path: str, name: str | None) -> dict[str, Rows]:
    """{split: rows}."""
    made: dict[str, dict[str, Rows]] = {
        "cais/mmlu": _alike(["dev", "test"], [_mmlu(i) for i in range(5)]),
        "TIGER-Lab/MMLU-Pro": _alike(["validation", "test"], [_pro(c, i) for c in CATEGORIES for i in range(5)]),
        "allenai/ai2_arc": _alike(["train", "validation", "test"], [_arc(i) for i in range(26)]),
        "Idavidrein/gpqa": {"train": [_gpqa(i) for i in range(3)]},
        "Rowan/hellaswag": _alike(["train", "validation"], [_hellaswag(i) for i in range(11)]),
        "allenai/winogrande": _alike(["train", "validation"], [_winogrande(i) for i in range(6)]),
        "google/IFEval": {"train": _instructions()},
        "wis-k/instruction-following-eval": {"train": _instructions()},
        "openai/gsm8k": _alike(["train", "test"], [_gsm8k(i) for i in range(6)]),
        "EleutherAI/hendrycks_math": _alike(["train", "test"], [_math(i) for i in range(3)]),
        "DigitalLearningGmbH/MATH-lighteval": _alike(["train", "test"], [_math(i) for i in range(3)]),
        "ceval/ceval-exam": _alike(["dev", "val"], [_ceval(i) for i in range(5)]),
        "haonan-li/cmmlu": _alike(["dev", "test"], [_cmmlu(i) for i in range(5)]),
        "TAUR-Lab/MuSR": _alike(MYSTERIES, [_musr(0), _musr(1)]),
        "truthfulqa/truthful_qa": {"validation": [_truthful(0), _truthful(1)]},
        "openai/openai_humaneval": {"test": [_humaneval(0), _humaneval(1)]},
        "evalplus/humanevalplus": {"test": [_humaneval(0), _humaneval(1)]},
        "google-research-datasets/mbpp": {"test": [_mbpp(0), _mbpp(1)]},
        "evalplus/mbppplus": {"test": [_mbpp(0), _mbpp(1)]},
        "SaylorTwift/bbh": {"test": _bbh(str(name))},
    }  # fmt: skip
    return made[path]


def _alike(splits: Sequence[str], rows: Rows) -> dict[str, Rows]:
    return dict.fromkeys(splits, rows)


def _mmlu(i: int) -> dict[str, Any]:
    return {"question": f"What is {i} + 1?", "subject": "x", "choices": [str(i + k) for k in range(4)], "answer": 1}


def _pro(category: str, i: int) -> dict[str, Any]:
    thought = f"A: Let's think step by step. It is {i + 1}. The answer is (B)."
    row = {"question_id": i, "question": f"What is {i} + 1?", "options": [str(i + k) for k in range(10)], "answer": "B"}
    return row | {"answer_index": 1, "cot_content": thought, "category": category, "src": "x"}


def _arc(i: int) -> dict[str, Any]:
    choices = {"text": [f"thing {k}" for k in range(4)], "label": list(LETTERS if i % 2 else "1234")}
    return {
        "id": str(i),
        "question": f"Which is thing {i % 4}?",
        "choices": choices,
        "answerKey": choices["label"][i % 4],
    }


def _gpqa(i: int) -> dict[str, Any]:
    wrong = {f"Incorrect Answer {k}": f"{i + k} m" for k in (1, 2, 3)}
    return {"Question": f"How long is it, {i}?", "Correct Answer": f"{i} m", **wrong}


def _hellaswag(i: int) -> dict[str, Any]:
    row = {"ind": i, "activity_label": "Baking", "ctx_a": "A man mixes flour.", "ctx_b": "he", "ctx": "A man mixes. He"}
    return row | {"endings": [f"does thing {k}." for k in range(4)], "label": str(i % 4), "split": "val"}


def _winogrande(i: int) -> dict[str, Any]:
    return {
        "sentence": f"Ann {i} met Eve because _ was in.",
        "option1": "Ann",
        "option2": "Eve",
        "answer": str(1 + i % 2),
    }


def _instructions() -> Rows:
    nothing = {"num_sentences": None, "relation": None, "capital_frequency": None, "capital_relation": None}
    asked = [
        ("punctuation:no_comma", nothing),
        ("length_constraints:number_sentences", nothing | {"num_sentences": 2, "relation": "less than"}),
        ("change_case:capital_word_frequency", nothing | {"capital_frequency": 1, "capital_relation": "at least"}),
        ("detectable_format:json_format", nothing),
    ]
    return [
        {"key": i, "prompt": f"Write of {i}.", "instruction_id_list": [name], "kwargs": [kwargs]}
        for i, (name, kwargs) in enumerate(asked)
    ]


def _gsm8k(i: int) -> dict[str, Any]:
    return {
        "question": f"Ann has {i} pears and gets 1000. How many?",
        "answer": f"{i} + 1000 = {i + 1000}\n#### {i + 1000:,}",
    }


def _math(i: int) -> dict[str, Any]:
    solution = f"We halve, so the answer is $\\boxed{{\\frac{{{i + 1}}}{{2}}}}$."
    return {"problem": f"What is half of ${i + 1}$?", "level": "Level 5", "type": "Algebra", "solution": solution}


def _ceval(i: int) -> dict[str, Any]:
    choices = {letter: str(i + k) for k, letter in enumerate(LETTERS)}
    return {"id": i, "question": f"{i}加一等于____。", **choices, "answer": "B", "explanation": ""}


def _cmmlu(i: int) -> dict[str, Any]:
    return {"Question": f"{i}加一等于", **{letter: str(i + k) for k, letter in enumerate(LETTERS)}, "Answer": "B"}


def _musr(i: int) -> dict[str, Any]:
    row = {"narrative": "It was late.", "question": "Who did it?", "choices": "['Ann', 'Eve']"}
    return row | {"answer_index": i, "answer_choice": ["Ann", "Eve"][i]}


def _truthful(i: int) -> dict[str, Any]:
    one = {"choices": ["No.", "Yes.", "Often."], "labels": [1, 0, 0]}
    return {"question": f"Do pigs fly, {i}?", "mc1_targets": one, "mc2_targets": one | {"labels": [1, 1, 0]}}


def _humaneval(i: int) -> dict[str, Any]:
    row = {"task_id": f"HumanEval/{i}", "prompt": 'def one_more(x):\n    """x + 1"""\n', "entry_point": "one_more"}
    test = "def check(candidate):\n    assert candidate(1) == 2\n"
    return row | {"canonical_solution": "    return x + 1\n", "test": test}


def _mbpp(i: int) -> dict[str, Any]:
    asked = f"Write a function that adds {i}."
    asserts = [f"assert add(1) == {1 + i}"]
    row = {"task_id": i, "text": asked, "prompt": asked, "code": f"def add(x):\n    return x + {i}", "test": asserts[0]}
    return row | {"test_list": asserts, "test_imports": [], "test_setup_code": "", "challenge_test_list": []}


def _bbh(name: str) -> Rows:
    """Questions that the harness itself shows as examples."""
    import yaml
    from lm_eval import tasks

    file = Path(next(iter(tasks.__path__))) / "leaderboard/bbh_mc" / f"{name}.yaml"
    if not file.is_file():
        return [{"input": "[ {", "target": "} ]"}, {"input": "( [", "target": "] )"}]
    return yaml.safe_load(file.read_text())["fewshot_config"]["samples"]


def write_datasets(folder: Path, sources: Iterable[Any]) -> None:
    for source in sources:
        write_dataset(folder, source.path, source.name)
