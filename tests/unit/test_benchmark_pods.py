"""On a cluster each task of the benchmark has a pod with its own store; what a lost pod leaves out is measured."""

import json
import shutil

import pytest
from test_benchmark import config, evaluated, scores_of  # noqa: F401 - evaluated is a fixture

from controlllm.adopt import adopt
from controlllm.benchmark import stage
from controlllm.config import PackConfig
from controlllm.errors import UserError
from controlllm.ingest import ingest_data

SETTINGS = config(old=["chat", "python"])


@pytest.fixture
def data(tiny_base, store):
    return ingest_data(tiny_base, None, SETTINGS, PackConfig()).path


def pod(number: int, tmp_path, monkeypatch, data, tiny_base, name: str):
    """A task's output, from a store that ends with its pod."""
    monkeypatch.setenv("CONTROLLLM_CACHE", str(tmp_path / f"pod-{number}"))
    made = stage.benchmark_task(name, tiny_base, data, SETTINGS)
    brought = tmp_path / f"part-{number}"
    shutil.copytree(made, brought)
    shutil.rmtree(tmp_path / f"pod-{number}")
    return brought


def test_pods_share_a_benchmark(tiny_base, data, tmp_path, monkeypatch, evaluated):  # noqa: F811
    names = stage.task_names(tiny_base, data, SETTINGS)
    assert names == ["puzzles", "chat", "python"]
    parts = [pod(n, tmp_path, monkeypatch, data, tiny_base, name) for n, name in enumerate(names[:2])]
    assert evaluated == ["puzzles", "chat"]

    monkeypatch.setenv("CONTROLLLM_CACHE", str(tmp_path / "gathering"))
    scores = scores_of(stage.gather(parts, tiny_base, data, SETTINGS))
    assert evaluated == ["puzzles", "chat", "python"], "the third pod was lost: only its task is measured here"
    assert set(scores["tasks"]) == set(names)
    assert scores["tasks"]["puzzles"]["role"] == "new"


def test_a_part_that_was_damaged_on_its_way_is_measured_again(tiny_base, data, tmp_path, monkeypatch, evaluated):  # noqa: F811
    part = pod(0, tmp_path, monkeypatch, data, tiny_base, "chat")
    task = part / "task.json"
    task.write_text(json.dumps(json.loads(task.read_text()) | {"score": 1.0}))
    monkeypatch.setenv("CONTROLLLM_CACHE", str(tmp_path / "gathering"))
    stage.gather([part], tiny_base, data, config(new=[], old=["chat"]))
    assert evaluated == ["chat", "chat"]


def test_a_folder_that_no_stage_made_is_refused(store, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"has no lineage\.json"):
        adopt(tmp_path / "other")
