"""Measuring: tasks are stored one by one, one that fails does not lose the others, and a checkpoint needs no recipe."""

import json
import shutil

import pytest

from controlllm.benchmark import stage
from controlllm.benchmark.items import items_of, metrics_of, read_items
from controlllm.benchmark.task import Task
from controlllm.cli import main
from controlllm.config import BenchmarkConfig, PackConfig
from controlllm.errors import UserError
from controlllm.ingest import ingest_data

pytestmark = pytest.mark.usefixtures("store")
CONFIG = {"items": 4, "batch_size": 4, "dtype": "float32", "backend": "hf"}


def config(**changes) -> BenchmarkConfig:
    return BenchmarkConfig.model_validate({"new": ["puzzles"], "old": ["chat"]} | CONFIG | changes)


def measured(base, settings):
    return stage.benchmark(base, ingest_data(base, None, settings, PackConfig()).path, settings)


def scores_of(output) -> dict:
    return json.loads((output.path / "scores.json").read_text())


@pytest.fixture
def evaluated(monkeypatch):
    """The names of the tasks that the model really ran."""
    from controlllm.benchmark import evaluate

    names, real = [], evaluate.evaluate_task

    def run(task, *args):
        names.append(task.name)
        real(task, *args)

    monkeypatch.setattr(evaluate, "evaluate_task", run)
    return names


def test_only_a_new_task_is_run(tiny_base, evaluated):
    first = scores_of(measured(tiny_base, config()))
    more = scores_of(measured(tiny_base, config(old=["chat", "python"], batch_size=2)))
    assert evaluated == ["puzzles", "chat", "python"]
    assert more["tasks"]["chat"] == first["tasks"]["chat"]
    assert {name: task["role"] for name, task in more["tasks"].items()} == {
        "puzzles": "new",
        "chat": "old",
        "python": "old",
    }


def test_a_changed_setting_runs_them_again(tiny_base, evaluated):
    measured(tiny_base, config(new=[]))
    measured(tiny_base, config(new=[], dtype="bfloat16"))
    measured(tiny_base, config(new=[], items=3))
    assert evaluated == ["chat"] * 3


def test_a_failed_task_does_not_lose_the_others(tiny_base, monkeypatch, capsys):
    from controlllm.benchmark import evaluate

    real = evaluate.evaluate_task
    broken = lambda task, *args: 1 / 0 if task.name == "chat" else real(task, *args)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_task", broken)
        output = measured(tiny_base, config(old=["chat", "python"]))
    found = scores_of(output)
    assert set(found["tasks"]) == {"puzzles", "python"}
    assert list(found["failed"]) == ["chat"]
    with pytest.raises(UserError, match=r"1 of 3 tasks failed: chat: .*division by zero"):
        stage.refuse_failed(output.path)
    assert "chat failed" in capsys.readouterr().err
    assert not scores_of(measured(tiny_base, config(old=["chat", "python"])))["failed"]


def test_results_are_those_of_lm_eval(tiny_base):
    output = measured(tiny_base, config(old=["mmlu-dev", "prose"]))
    theirs = json.loads((output.path / "results.json").read_text())["results"]
    ours = scores_of(output)["tasks"]
    assert theirs["puzzles"]["exact_match,strip"] == ours["puzzles"]["metrics"]["exact_match"]
    assert theirs["mmlu-dev"]["acc_norm,none"] == ours["mmlu-dev"]["metrics"]["accuracy"]
    assert str(tiny_base) not in (output.path / "results.json").read_text()


def test_items_say_what_was_asked_and_answered(tiny_base):
    output = measured(tiny_base, config(old=["mmlu-dev", "prose"]))
    puzzle, choice, text = (read_items(output.path, name)[0] for name in ("puzzles", "mmlu-dev", "prose"))
    assert puzzle["prompt"].endswith("<|im_start|>assistant\n")
    assert puzzle["correct"] is False
    assert puzzle["loss"] > 0
    assert puzzle["target"] not in puzzle["output"] or not puzzle["target"]
    assert choice["target"]
    assert choice["output"]
    assert choice["correct"] is (choice["target"] == choice["output"])
    assert text["output"] is None
    assert text["tokens"] == len(text["target"].encode())


def sample(value, **changes) -> dict:
    answer = {"doc_id": 0, "doc": {}, "target": "x", "arguments": [("q", {})], "resps": [["said"]]}
    return answer | {"filtered_resps": ["s"], "filter": "none", "metrics": ["score"], "score": value} | changes


def task(**changes) -> Task:
    values = {"name": "t", "title": "T", "suite": "s", "kind": "generate", "harness": (), "measure": "score"}
    return Task(**values | changes)


def test_scores_between_right_and_wrong_stay_scores():
    rows = items_of(task(), {"t": [sample(1.0), sample(0.5, doc_id=1)]}, None)
    assert [(row["correct"], row["score"]) for row in rows] == [(None, 1.0), (None, 0.5)]
    assert metrics_of(task(), rows) == {"score": 0.75}


def test_only_the_named_filter_counts():
    samples = {"t": [sample(1.0), sample(0.0, filter="strict"), sample(0.0, filter="strict", doc_id=1)]}
    assert metrics_of(task(filter="strict"), items_of(task(filter="strict"), samples, None)) == {"exact_match": 0.0}
    with pytest.raises(UserError, match="no filter 'lenient'; it has none, strict"):
        items_of(task(filter="lenient"), samples, None)
    with pytest.raises(UserError, match="lm-eval gives score, not 'acc'"):
        items_of(task(measure="acc"), {"t": [sample(1.0)]}, None)


def test_a_checkpoint_needs_no_recipe(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(tiny_base, tmp_path / "mine")
    options = ["--items", "3", "--dtype", "float32", "--backend", "hf"]
    assert main(["benchmark", str(model), "--suite", "prose", *options]) == 0
    assert main(["benchmark", str(model), "--suite", "python,mmlu-dev", *options]) == 0
    (folder,) = (tmp_path / "runs" / "benchmarks").iterdir()
    assert folder.name.startswith("mine-")
    assert set(json.loads((folder / "scores.json").read_text())["tasks"]) == {"prose", "python", "mmlu-dev"}
    assert len(read_items(folder, "prose")) == 3
    assert "controlllm compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["{model}"], "say with --suite what is measured"),
        (["{model}", "--suite", "pros"], "--suite: unknown task 'pros'; did you mean 'prose'?"),
        (["{model}", "--suite", "drift"], "drift is measured from a base model's answers"),
        (["{model}", "--suite", "prose", "--dtype", "int3"], "--dtype int3: Input should be"),
        (["{model}", "--suite", "code"], "humaneval runs programs that the model writes; allow it with --run-code"),
        (["{model}", "--suite", "prose", "--to", "{model}/config.json"], "config.json is a file; give another folder"),
        (["nowhere", "--suite", "prose"], "nowhere: no such folder"),
        (["{model}", "--suite", "prose", "--data", "nowhere"], "--data: nowhere is no folder"),
        (["{model}", "a=1", "--suite", "prose"], "a=1: a checkpoint has no recipe"),
        (["{model}/../recipe.yaml", "--suite", "prose"], "--suite is for a checkpoint"),
        (["."], "has no config.json"),
        ([], "give a recipe, or a checkpoint"),
    ],
)
def test_mistakes_are_one_line(args, said, tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tiny_base / "../recipe.yaml").write_text("name: x")
    assert main(["benchmark", *(arg.format(model=tiny_base) for arg in args)]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("error:") == 1
    assert "Traceback" not in error


def test_everything_that_can_be_measured_is_listed(capsys):
    assert main(["benchmark", "--list"]) == 0
    assert "puzzles" in capsys.readouterr().out
