"""Pages in a task's Deck: in a pod, of what was published, and of a training while it goes on."""

import json
import time
from contextlib import contextmanager

import pytest
from flytekit import FlyteContextManager
from flytekit.core.context_manager import ExecutionState

from controlllm.config import PackConfig
from controlllm.store import at_work, run_stage
from tasks import live
from tasks.artifacts import publish, show

pytestmark = pytest.mark.usefixtures("store")


@contextmanager
def running(mode, outputs):
    """As a task that flytekit runs, whose outputs go to a folder."""
    context = FlyteContextManager.current_context()
    params = context.user_space_params.with_enable_deck(enable_deck=True)
    params.output_metadata_prefix, params.decks = str(outputs), []
    state = (context.execution_state or ExecutionState(None)).with_params(mode=mode, user_space_params=params.build())
    with FlyteContextManager.with_context(context.with_execution_state(state)) as inside:
        yield inside.user_space_params


@pytest.fixture
def pod(tmp_path):
    with running(ExecutionState.Mode.TASK_EXECUTION, tmp_path / "outputs") as params:
        yield params


def made():
    return run_stage(
        "prepare piece", config={"pack": PackConfig()}, parents={},
        build=lambda folder: (folder / "index.json").write_text(json.dumps({"name": "a", "units": []})),
    ).path  # fmt: skip


def test_what_is_published_has_its_page_and_its_lineage(pod, monkeypatch, tmp_path):
    monkeypatch.setattr("tasks.artifacts.FlyteDirectory", lambda path, **_: path)  # nothing to upload to
    publish(made())
    decks = {deck.name: deck.html for deck in pod.decks}
    assert set(decks) == {"prepare piece", "lineage"}
    assert "pack.context_length" in decks["lineage"]
    assert "Control LLM · prepare piece" in decks["prepare piece"]


def test_a_page_that_cannot_be_made_costs_nothing(pod, capsys):
    def fail():
        raise RuntimeError("no fonts")

    show(fail)
    assert "the task's page was not made" in capsys.readouterr().err


def test_here_no_page_is_made(tmp_path):
    with running(ExecutionState.Mode.LOCAL_TASK_EXECUTION, tmp_path) as params:
        publish(made())
    assert params.decks == []


def test_a_training_is_seen_while_it_goes_on(pod, tmp_path, store):
    at = store / "train" / ".aa.partial"
    at.mkdir(parents=True)
    assert at_work("train") == at
    row = {"step": 1, "loss": 2.5, "tokens": 8}
    with live.live_deck(every_seconds=0.05):
        (at / "metrics.jsonl").write_text(json.dumps(row) + "\n" + '{"step": 2, "lo')  # a line that is being written
        page, end = tmp_path / "outputs" / "deck.html", time.monotonic() + 120
        while not page.exists() and time.monotonic() < end:
            time.sleep(0.1)
    assert "Training: step 1" in page.read_text()
    assert [deck.name for deck in pod.decks] == ["train"]


def test_processes_of_a_job_leave_the_page_to_their_parent(pod, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with live.live_deck(every_seconds=0.01):
        pass
    assert pod.decks == []
