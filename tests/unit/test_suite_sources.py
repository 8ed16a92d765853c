"""Where a suite's data and packages come from, and what is said where they are missing."""

import json
import shutil

import datasets
import pytest
from suite_data import write_dataset

from controlllm import pipeline
from controlllm.benchmark.suites import load, suite_tasks
from controlllm.benchmark.suites.needs import require
from controlllm.benchmark.suites.source import Source
from controlllm.config import load_config
from controlllm.errors import UserError


@pytest.fixture(autouse=True)
def cached(tmp_path_factory, monkeypatch):
    """What `datasets` makes of files goes away with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def test_another_dataset_is_another_task(tmp_path):
    write_dataset(tmp_path, "openai/gsm8k", "main")
    (before,) = suite_tasks(["gsm8k"], prompts="instruct", data=tmp_path)
    (again,) = suite_tasks(["gsm8k"], prompts="instruct", data=tmp_path)
    assert before == again
    with (tmp_path / "openai/gsm8k/main/test.jsonl").open("a") as file:
        file.write(json.dumps({"question": "?", "answer": "#### 1"}) + "\n")
    assert suite_tasks(["gsm8k"], prompts="instruct", data=tmp_path)[0].data != before.data


def saved(folder):
    write_dataset(folder / "raw", "openai/gsm8k", "main")
    made = datasets.load_dataset(str(folder / "raw/openai/gsm8k/main"))
    made.save_to_disk(str(folder / "openai/gsm8k/main"))


def parquet(folder):
    saved(folder)
    found = datasets.load_from_disk(str(folder / "openai/gsm8k/main"))
    shutil.rmtree(folder / "openai")
    for split, rows in found.items():
        rows.to_parquet(str(folder / f"openai/gsm8k/main/{split}-00000-of-00001.parquet"))


def snapshot(folder):
    parquet(folder)
    (folder / "openai/gsm8k/main").rename(folder / "openai/gsm8k/rows")
    files = [{"split": split, "path": f"rows/{split}-*"} for split in ("train", "test")]
    header = json.dumps({"license": "mit", "configs": [{"config_name": "main", "data_files": files}]})
    (folder / "openai/gsm8k/README.md").write_text(f"---\n{header}\n---\n# GSM8K\n")


@pytest.mark.parametrize("form", [saved, parquet, snapshot])
def test_a_dataset_may_lie_in_several_forms(form, tmp_path):
    form(tmp_path)
    found = Source("openai/gsm8k", "main", str(tmp_path), ("train", "test"))()
    assert found["test"][0]["answer"].endswith("#### 1,000")


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    (task,) = suite_tasks(["gsm8k"], prompts="pretrain", data=tmp_path)
    with pytest.raises(UserError, match=r"has no dataset openai/gsm8k \(main\); put it there as openai/gsm8k/main"):
        load(task)
    write_dataset(tmp_path, "openai/gsm8k", "main")
    (tmp_path / "openai/gsm8k/main/test.jsonl").unlink()
    with pytest.raises(UserError, match=r"the split 'test' of openai/gsm8k \(main\) is missing; it has train"):
        load(task)
    (tmp_path / "openai/gsm8k/main/test.jsonl").write_text("{nonsense\n")
    with pytest.raises(UserError, match=r"cannot be read as a dataset") as error:
        load(task)
    assert "\n" not in str(error.value)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (task,) = suite_tasks(["gsm8k"], prompts="pretrain", data=None)
    with pytest.raises(UserError, match=r"gsm8k \(main\) cannot be had from the Hub or its cache .* benchmark.data"):
        load(task)


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match=r"x needs the package no_such_package.*controlllm\[benchmarks\]"):
        require("x", ["no_such_package"])


def test_ifeval_says_where_its_splitter_comes_from(monkeypatch):
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: False)
    with pytest.raises(UserError, match=r"x needs NLTK's data punkt_tab.*NLTK_DATA"):
        require("x", ["punkt_tab"])


def prepared(recipe, tmp_path, *changes):
    """The questions of a file with a suite's question in it, and what came of them."""
    asked = [json.loads(line)["question"] for line in (tmp_path / "openai/gsm8k/main/test.jsonl").open()]
    rows = [{"question": text, "answer": "1"} for text in (asked[0].upper(), "What is one and one, my friend?")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = "{prompt: question, completion: answer}"
    own = f"{{name: own, source: {tmp_path}/own.jsonl, format: prompt_completion, fields: {fields}}}"
    settings = [f"mix.datasets=[{own}]", "benchmark.new=[gsm8k]", f"benchmark.data={tmp_path}"]
    settings += ["pack.validation_fraction=0", "validation=null", *changes]
    pipeline.run(load_config(recipe, *settings), until="prepare")


def test_what_a_suite_asks_is_not_trained_on(recipe, store, tmp_path):
    write_dataset(tmp_path, "openai/gsm8k", "main")
    prepared(recipe, tmp_path)
    (stats,) = store.glob("prepare/*/stats.json")
    assert json.loads(stats.read_text())["packed_rows"] == 1
    assert json.loads(stats.read_text())["filtered_rows"] == 1


def test_items_that_cannot_be_had_end_it_before_training(recipe, store, tmp_path):
    write_dataset(tmp_path, "openai/gsm8k", "main")
    with pytest.raises(UserError, match=r"the items of mmlu cannot be had.*cais/mmlu"):
        prepared(recipe, tmp_path, "benchmark.old=[mmlu, chat]")
    prepared(recipe, tmp_path, "benchmark.old=[mmlu, chat]", "mix.decontaminate=none")
