"""The end of a run: its model is promoted, or held by the gate with what was lost; the looks that a recipe asks for."""

import json
from pathlib import Path

import pytest

from controlllm import pipeline
from controlllm.cli import main
from controlllm.config import load_config
from controlllm.errors import UserError

pytestmark = pytest.mark.usefixtures("store")
LOOKS = ("probe.prompts=[Sort these numbers, Hello]", "report.dial=[0.5]", "benchmark.old=[chat]", "benchmark.items=12")


def test_a_run_with_every_look(recipe, store):
    config = load_config(recipe, *LOOKS, "benchmark.gate={old: -50, chat: -50}")
    pipeline.run(config)
    output = Path(config.output) / config.name
    page = (output / "report.html").read_text()
    assert "alpha scale" in page
    summary = json.loads((output / "summary" / "summary.json").read_text())
    assert summary["gate"]["passed"]
    took = {stage["stage"]: stage["seconds"] for stage in summary["stages"]}
    assert {"dial", "probe"} <= set(took)
    assert took["benchmark (base)"] >= json.loads((output / "base-scores" / "scores.json").read_text())["seconds"] > 0
    assert (output / "model" / "config.json").is_file()
    assert (output / "scores" / "scores.json").is_file()
    assert (output / "base-scores" / "scores.json").is_file()
    (dial,) = [f for f in (store / "dial").iterdir() if not f.name.startswith(".")]
    points = json.loads((dial / "dial.json").read_text())["points"]
    assert [point["alpha_scale"] for point in points] == [0, 0.5, 1]
    assert points[0]["probes"]["chat"]["difference"] == 0
    (probe,) = [f for f in (store / "probe").iterdir() if not f.name.startswith(".")]
    figure = json.loads((probe / "probe.json").read_text())["figures"][0]
    assert figure["title"] in page


def test_the_gate_holds_a_model_and_keeps_the_one_before(recipe, capsys):
    held = ["benchmark.gate={puzzles: 90}", "benchmark.old=[chat]"]
    assert main(["finetune", str(recipe), "benchmark.old=[chat]"]) == 0
    config = load_config(recipe)
    output = Path(config.output) / config.name
    before = (output / "model").resolve()
    capsys.readouterr()
    assert main(["finetune", str(recipe), *held, "train.lr=0.002"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: gate: puzzles ")
    assert error.endswith("the model is not promoted")
    assert "demands a gain of 90" in error
    assert (output / "model").resolve() == before
    assert (output / "refused").resolve() != before
    assert "not promoted" in (output / "report.html").read_text()
    assert main(["finetune", str(recipe), "benchmark.old=[chat]", "train.lr=0.002"]) == 0
    assert not (output / "refused").exists()
    assert (output / "model").resolve() != before


def test_a_gate_names_what_is_measured(recipe, capsys):
    assert main(["config", "check", str(recipe), "benchmark.gate={general: -2.0}"]) == 1
    assert "benchmark.gate: general is not measured; known: chat, " in capsys.readouterr().err


def test_a_dial_needs_twins(recipe):
    with pytest.raises(UserError, match=r"report\.dial turns twins down, and this run has none"):
        load_config(recipe, "control=null", "report.dial=[0.5]")


def test_a_failed_task_ends_the_run_before_the_report(recipe, monkeypatch, capsys):
    from controlllm.benchmark import evaluate

    real = evaluate.evaluate_task
    monkeypatch.setattr(evaluate, "evaluate_task", lambda task, *a: 1 / 0 if task.name == "chat" else real(task, *a))
    assert main(["finetune", str(recipe)]) == 1
    assert "1 of 3 tasks failed: chat: " in capsys.readouterr().err.splitlines()[-1]
