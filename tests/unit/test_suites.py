"""Every task of every suite runs, a right answer counts and a wrong one does not, and data come from a folder."""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from lm_eval.api.model import LM
from suite_data import write_datasets

from controlllm.benchmark import evaluate
from controlllm.benchmark.code import running_code
from controlllm.benchmark.items import metrics_of
from controlllm.benchmark.suites import listed, load, loading, suite_names, suite_tasks, task_names
from controlllm.benchmark.suites.needs import require
from controlllm.benchmark.task import Task
from controlllm.config import BenchmarkConfig
from controlllm.errors import UserError

CODE = [task.name for task in suite_tasks(["code"], prompts="instruct", data=None)]
STYLES = ("instruct", "pretrain")
PAIRS = [(name, prompts) for name in task_names() for prompts in STYLES if name not in CODE]
PUNKT = ["collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"]


@pytest.fixture(scope="module")
def punkt(tmp_path_factory):
    """NLTK's sentence splitter without a word of what it learned; enough to count plain sentences."""
    import nltk

    folder = tmp_path_factory.mktemp("nltk")
    english = folder / "tokenizers/punkt_tab/english"
    english.mkdir(parents=True)
    for name in PUNKT:
        (english / name).write_text("")
    nltk.data.path.insert(0, str(folder))
    yield folder
    nltk.data.path.remove(str(folder))


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """What `datasets` makes of files goes away with the test."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def data(tmp_path_factory, cached, punkt):
    return tmp_path_factory.mktemp("data")


class Says(LM):
    """Gives these texts one after another, and calls every continuation equally likely."""

    tokenizer_name = "none"

    def __init__(self, *texts):
        super().__init__()
        self.texts, self.asked = list(texts), []

    def generate_until(self, requests, **_):
        self.asked += [request.args[0] for request in requests]
        return [self.texts[i % len(self.texts)] for i in range(len(requests))]

    def loglikelihood(self, requests, **_):
        self.asked += [request.args[0] for request in requests]
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests, **_):
        raise NotImplementedError

    def count_after(self, prompt, target):
        return len(target)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        said = "".join(f"<{m['role']}>{m['content']}" for m in chat_history)
        return said + "<assistant>" * add_generation_prompt


@cache
def a_few(name: str, prompts: str, subtasks: int | None) -> Task:
    """A task of the table with its first subtasks only."""
    from lm_eval.tasks import TaskManager

    (task,) = suite_tasks([name], prompts=prompts, data=None)
    index = TaskManager(include_defaults=False, include_path=str(task.include)).task_index
    members = [given | {"task": leaf} for given in task.harness for leaf in loading._leaves(task, index, given["task"])]
    return replace(task, harness=tuple(members[:subtasks]), limit=2)


def with_data(task: Task, data: Path) -> Task:
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_defaults=False, include_path=str(task.include)).task_index
    members = [member for given in task.harness for member in loading._members(task, index, given)]
    write_datasets(data, [member["custom_dataset"] for member in members])
    return replace(task, harness=tuple(given | {"dataset_kwargs": {"folder": str(data)}} for given in task.harness))


def rows_of(task: Task, lm, folder: Path):
    import pyarrow.parquet as pq

    models = SimpleNamespace(of=lambda kind, advance: lm, backend=lambda kind: "hf")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with running_code():
        evaluate.evaluate_task(task, models, folder)
    return pq.read_table(folder / "items.parquet").to_pylist()


def installed(name: str) -> None:
    try:
        require(name, listed.needs_of(name))
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tiny_lm(tmp_path_factory, tokenizer):
    """A random model of one layer, as the stage opens it."""
    import torch
    from conftest import tiny_config
    from transformers import LlamaForCausalLM

    from controlllm.benchmark.lm import open_lm

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(tiny_config(num_hidden_layers=1, max_position_embeddings=4096)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = BenchmarkConfig(dtype="float32", backend="hf", batch_size=4)
    with open_lm(folder, config, "hf", lambda done, note="": None) as lm:
        yield lm


def short(monkeypatch) -> None:
    """Answers of four tokens: a random model ends none by itself."""

    def loaded(task):
        found = load(task)
        for each in found["tasks"].values():
            if each.config.generation_kwargs:
                each.config.generation_kwargs["max_gen_toks"] = 4
        return found

    monkeypatch.setattr("controlllm.benchmark.suites.load", loaded)


def runs(name, prompts, subtasks, lm, data, folder, monkeypatch):
    installed(name)
    short(monkeypatch)
    task = with_data(a_few(name, prompts, subtasks), data)
    rows = rows_of(task, lm, folder)
    assert {row["subtask"] for row in rows} == {given["task"] for given in task.harness}
    assert all(row["prompt"] and row["target"] for row in rows)
    assert ("<|im_start|>user" in rows[0]["prompt"]) == task.chat
    said = metrics_of(task, rows)
    assert next(iter(said)) == ("score" if "truthfulqa" in name else task.metric)
    assert 0 <= next(iter(said.values())) <= 1


@pytest.mark.parametrize(("name", "prompts"), PAIRS)
def test_each_runs(name, prompts, tiny_lm, data, tmp_path, monkeypatch):
    runs(name, prompts, 2, tiny_lm, data, tmp_path / "out", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prompts"), PAIRS)
def test_each_runs_with_all_its_subtasks(name, prompts, tiny_lm, data, tmp_path, monkeypatch):
    runs(name, prompts, None, tiny_lm, data, tmp_path / "out", monkeypatch)


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("prompts", STYLES)
def test_code_tasks_have_their_data_and_metric(name, prompts, data):
    """What they run is tested beside the sandbox."""
    task = with_data(a_few(name, prompts, None), data)
    (found,) = load(task)["tasks"].values()
    doc = next(iter(found.eval_docs))
    assert found.doc_to_text(doc)
    assert found.process_results(doc, [{"passed": True}]) == {task.measure: 1.0}
    assert {filters.name for filters in found._filters} == {task.filter}


HALF = "So.\nFinal Answer: The final answer is $\\frac{1}{2}$. I hope it is correct."
ANSWERS = [  # what is said to the first item, and what to the second; the first is right
    ("mmlu-generative", "instruct", " B", " C"),
    ("mmlu-generative", "pretrain", "B.", "C"),
    ("mmlu-pro", "instruct", "It is 1. The answer is (B).", "The answer is (C)."),
    ("arc-challenge", "instruct", " A.", " C."),
    ("bbh", "pretrain", "So the answer is False.", "So the answer is True."),
    ("gsm8k", "instruct", "It is 0 + 1000. The final answer is 1000", "The final answer is 7"),
    ("gsm8k", "pretrain", "Ann has 0. The answer is 1,000.", "The answer is 7."),
    ("leaderboard-v1-gsm8k", "pretrain", "0 + 1000\n#### 1000", "#### 7"),
    ("hendrycks-math", "instruct", "It is $\\boxed{0.5}$.", "It is $\\boxed{7}$."),
    ("hendrycks-math", "pretrain", HALF, HALF),
    ("math-hard", "instruct", "It is $\\boxed{\\frac12}$.", "It is $\\boxed{7}$."),
    ("math-hard", "pretrain", HALF, HALF),
    ("ifeval", "instruct", "No commas. At all.", "One. Two. Three."),
    ("ceval-cot", "instruct", "先看A。所以，答案是 B。", "答案是C"),
    ("cmmlu-cot", "pretrain", "因此正确选项为（B）", "无法确定，C"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "prompts", "right", "wrong"), ANSWERS)
def test_a_right_answer_counts_and_a_wrong_one_does_not(name, prompts, right, wrong, data, tmp_path):
    installed(name)
    task = with_data(a_few(name, prompts, 1), data)
    rows = rows_of(task, Says(right, wrong), tmp_path / "out")
    assert [row["correct"] for row in rows] == [True, False]
    assert [row["output"] for row in rows] == [right, wrong]


@pytest.mark.parametrize(
    "said",
    [
        "答案是B",
        "答案：B",
        "答案为 (B)。",
        "答案应为“B”",
        "**答案是：B**",
        "故选B",
        "答案是A，不对。答案是B",
        "\\boxed{B}",
    ],
)
def test_chinese_answers_are_found_in_many_forms(said, data, tmp_path):
    task = with_data(a_few("ceval-cot", "instruct", 1), data)
    assert all(row["correct"] for row in rows_of(task, Says(said), tmp_path / "out"))


def test_what_is_asked_follows_the_style(data, tmp_path):
    asked = {}
    for prompts in STYLES:
        lm = Says("B")
        rows_of(with_data(a_few("mmlu-generative", prompts, 1), data), lm, tmp_path / "out")
        asked[prompts] = lm.asked[0]
    assert asked["instruct"].count("<user>") == 6  # five examples, each with its answer as a turn
    assert asked["instruct"].endswith("<assistant>")
    assert asked["pretrain"].count("Answer:") == 6
    assert "<user>" not in asked["pretrain"]


def test_shuffled_choices_are_the_same_for_every_model(data, tmp_path):
    """And the same in the question as in the answer key, which lm-eval reads after the model has answered."""
    task = with_data(a_few("gpqa", "pretrain", 1), data)
    first, second = (rows_of(replace(task, limit=None), Says(), tmp_path / "out") for _ in range(2))
    assert first == second
    for row in first:
        key = row["target"]
        assert f"{key} {row['prompt'].split(', ')[1].split('?')[0]} m\n" in row["prompt"]


def test_each_task_has_one_name_and_what_its_suite_says():
    assert len(set(task_names())) == len(task_names())
    assert not set(task_names()) & set(suite_names())
    both = [
        suite_tasks([s for s in suite_names() if s != "offline"], prompts=p, data=None)
        for p in ("instruct", "pretrain")
    ]
    assert [[t.name for t in tasks] for tasks in both] == [task_names()] * 2
    assert len({t.title for t in both[0]}) == len(task_names())
    with pytest.raises(UserError, match=r"'maths' is no suite and no task"):
        suite_tasks(["maths"], prompts="instruct", data=None)
