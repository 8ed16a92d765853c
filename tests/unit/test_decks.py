"""The page of each stage: it shows what is there, escapes it, and gives nothing private away."""

import json
from pathlib import Path

import numpy as np
import pytest
from report_inputs import EVIL, PROBES, write_scores
from safetensors.numpy import save_file

from controlllm.cli import main
from controlllm.data.manifest import list_source
from controlllm.decks import deck_of, decks_of, gate_deck, live_page
from controlllm.store import run_stage

pytestmark = pytest.mark.usefixtures("store")
SECRET = "planted-secret-0123"


def output(stage, write, **config):
    return run_stage(stage, config=config, parents={}, build=write).path


def base(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": [EVIL], "num_hidden_layers": 4}))
    save_file({f"layer.{EVIL}": np.zeros((2, 3), np.float32)}, folder / "model.safetensors")
    (folder / "base.json").write_text(json.dumps({"license": f"licence {EVIL}"}))


def data(folder: Path) -> None:
    source = folder.parent / "rows.jsonl"
    source.write_text(json.dumps({"text": f"{EVIL} hello"}) + "\n")
    (folder / "manifests").mkdir()
    made = list_source(str(source), unit_rows=10).to_json()
    (folder / "manifests" / "mine.json").write_text(json.dumps(made))
    (folder / "probes").mkdir()
    item = {"id": 0, "prompt": f"{EVIL} {SECRET}", "target": "x"}
    (folder / "probes" / "chat.jsonl").write_text(json.dumps(item) + "\n")


def prepared(folder: Path) -> None:
    counts = {"rows": 9, "filtered_rows": 2, "bad_rows": 1, "documents": 6, "packed_rows": 3, "tokens": 400}
    counts |= {"target_tokens": 100, "validation_documents": 0, "padding": 0.25}
    own = counts | {"filtered": {"repeated": 2}, "cut": {}, "lengths": {"64": 4, "128": 2}}
    (folder / "stats.json").write_text(json.dumps(counts | {"datasets": {EVIL: own}}))
    (folder / "quarantine.jsonl").write_text(json.dumps({"reason": f"{EVIL} in /mnt/disk7/rows.jsonl"}) + "\n")


def trained(folder: Path) -> None:
    facts = {"steps": 2, "tokens": 90, "target_tokens": 30, "seconds": 1.0, "trained_parameters": 1}
    facts |= {"total_parameters": 2, "environment": {"device": EVIL}}
    (folder / "train.json").write_text(json.dumps(facts))
    rows = [{"step": step, "loss": 3.0 - step, "alpha": {"1": 0.5}} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def scored(folder: Path) -> None:
    made = write_scores(folder / "made", PROBES, failed={"gone": f"{EVIL} /home/someone/x"}, note=EVIL)
    scores = json.loads((made / "scores.json").read_text())
    for task in scores["tasks"].values():
        task |= {"title": EVIL, "seconds": 1.0, "backend": "hf"}
    (folder / "scores.json").write_text(json.dumps(scores))
    (made / "items").rename(folder / "items")


PAGES = {
    "ingest model": (base, ["licence", "Layers", "model.safetensors"]),
    "ingest data": (data, ["mine", "hello", "Probe items", "as its source says"]),
    "prepare": (prepared, ["25.00 %", "repeats an earlier document", "documents", "Not shown: the base model"]),
    "train": (trained, ["Loss, nats per token", "<svg", "Steps"]),
    "consolidate": (base, ["2 × 3", "F32", "plain", "xxh3-128"]),
    "benchmark": (scored, ["1 of 7 tasks failed", "solved", "gone"]),
}


@pytest.mark.parametrize("stage", PAGES)
def test_a_page_shows_its_stage_and_runs_nothing(stage, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    write, shown = PAGES[stage]
    folder = output(stage, write, model={"name": f"https://me:{SECRET}@host/{EVIL}"}, data="/home/someone/rows")
    for page in decks_of(folder).values():
        assert EVIL not in page
        assert "<script" not in page
        for secret in (SECRET, "/home/someone", "/mnt/disk7", str(folder)):
            assert secret not in page
    page = deck_of(folder)
    assert [text for text in shown if text not in page] == []
    assert "Computed: first time" in page
    assert "prefers-color-scheme: dark" in page


def test_curves_of_a_training_that_goes_on(tmp_path):
    assert "has not made a step yet" in live_page(tmp_path)
    trained(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "lo')
    page = live_page(tmp_path)
    assert "Training: step 2" in page
    assert "<svg" in page


def test_the_gates_page_says_what_follows(tmp_path):
    scores = {name: write_scores(tmp_path / name, PROBES, right=right)
              for name, right in (("base", {}), ("tuned", {"mmlu-dev": 0.2}))}  # fmt: skip
    made = output("consolidate", base)
    page = gate_deck({"margin": 2.0, "gate": {"mmlu-dev": -2.0}}, scores["base"], scores["tuned"], made)
    assert "The model is not promoted." in page
    assert "benchmark.gate allows 2" in page
    free = gate_deck({"margin": 2.0, "gate": {}}, scores["base"], scores["tuned"], made)
    assert "The recipe has no benchmark.gate" in free


def test_the_command_writes_the_page(tmp_path, capsys):
    folder = output("train", trained)
    assert main(["deck", str(folder), "--to", str(tmp_path / "page.html")]) == 0
    assert "Training" in (tmp_path / "page.html").read_text()
    capsys.readouterr()
    for arguments, said in (
        ([str(folder), "--stage", "smoke"], "has no smoke; it has"),
        ([str(tmp_path / "none")], "no such run, folder or file"),
        ([str(folder), "--to", str(tmp_path / "no" / "page.html")], "cannot be written"),
    ):
        assert main(["deck", *arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
