"""Launch plans, schedules and reruns as a user meets them: registered, run and asked about by the project's commands,
on the loopback backend, with real pods.
"""

import json
from datetime import UTC, datetime

import pytest
from backend import Backend
from backend.engine import wait_for
from conftest import RECIPE
from launching import controlllm, launch

pytestmark = pytest.mark.flow
POD = {"image": "cpu", "cpu": "1", "memory": "4Gi", "retries": 1}
ADDRESS = "training@example.org"
NIGHT = datetime(2026, 11, 30, 2, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_base):
    """What a cluster's volume holds: recipe, profile and, later, stage outputs."""
    folder = tmp_path_factory.mktemp("volume")
    (folder / "tiny.yaml").write_text(RECIPE.format(model=tiny_base, output=folder / "runs"))
    profile = {
        "cache": str(folder / "cache"),
        "volumes": [{"name": "shared", "mount": str(folder), "claim": "shared"}],
        "launch": {"notify": {"email": [ADDRESS], "on": ["failed"]}},
        **dict.fromkeys(("light", "data", "serve"), POD),
        "train": POD | {"nodes": 1, "processes_per_node": 1, "gpus_per_process": 0, "queue": {"name": "gpus"}},
    }
    (folder / "shared.yaml").write_text(json.dumps(profile))
    return folder


@pytest.fixture(scope="module")
def backend(place):
    """Everything registered, schedules active."""
    with Backend.running(place / "backend", {"OMP_NUM_THREADS": "1"}) as running:
        images = ["--image", "cpu=registry.example/cpu:1"]
        done = controlllm(
            running, "cluster", "register", "--profile", place / "shared.yaml", "--version", "1", *images,
            "--recipe", place / "tiny.yaml", "--activate",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        yield running


@pytest.fixture
def runs(backend, capsys, monkeypatch):
    """`controlllm runs ...` in this process: (exit code, what it printed)."""
    from controlllm.cli import run_app
    from tasks.remote.__main__ import app

    monkeypatch.setenv("FLYTECTL_CONFIG", str(backend.config))
    monkeypatch.setenv("FLYTE_DEFAULT_PROJECT", "p")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        code = run_app(app, list(map(str, arguments)), "controlllm runs")
        printed = capsys.readouterr()
        return code, printed.out if code == 0 else printed.err

    return run


def stages(backend, name) -> dict[str, object]:
    """By the task's name; the last of those that ran several times."""
    return {
        task.id.task_id.name.rpartition(".")[2]: node
        for node in backend.executions[name].nodes.values()
        for task in node.tasks
    }


def test_launch_plans_are_as_profile_and_recipe_say(backend):
    plans = {found.name: spec for found, spec in backend.registry.launch_plans.items()}
    nightly, weekly = plans["finetune-nightly"], plans["benchmark-weekly"]
    assert nightly.entity_metadata.schedule.cron_schedule.schedule == "0 2 * * *"
    assert nightly.entity_metadata.schedule.kickoff_time_input_arg == "kickoff"
    assert weekly.entity_metadata.schedule.cron_schedule.schedule == "0 4 * * 0"
    assert "config" in nightly.fixed_inputs.literals
    assert "config" in plans["finetune-on-demand"].default_inputs.parameters
    named = [plan for name, plan in plans.items() if not name.startswith("workflows.")]
    assert len(named) == 18
    for plan in named:
        assert plan.concurrency_policy.max == 1
        assert plan.concurrency_policy.behavior == 1  # skip
        assert plan.labels.values == {"kueue.x-k8s.io/queue-name": "gpus"}
        (notification,) = plan.entity_metadata.notifications
        assert list(notification.email.recipients_email) == [ADDRESS]
    assert {f"stage-{stage}" for stage in ("ingest", "prepare", "train", "consolidate", "report")} <= set(plans)
    assert {found.name for found in backend.registry.active.values()} >= {"finetune-nightly", "benchmark-weekly"}


def test_a_stage_runs_by_its_launch_plan_and_then_comes_from_the_cache(backend, place, runs):
    from controlllm.config import load_config

    config = load_config(place / "tiny.yaml")
    from tasks.ingest import ingest

    inputs = {name: getattr(config, name) for name in ("model", "mix", "benchmark", "pack")}
    names = []
    for _ in range(2):
        names.append(launch(backend, "stage-ingest", ingest, **inputs))
        record = backend.wait(names[-1])
        assert record.message.closure.phase == 4, record.message.closure.error.message
    code, listed = runs("ls")
    assert code == 0
    assert all(name in listed for name in names)
    found = [json.loads(runs("show", name, "--json")[1]) for name in names]
    assert [run["stages"][0]["cache"] for run in found] == ["computed", "cached"]
    code, again = runs("rerun", names[1], "--relaunch", "--again", "--wait")
    assert code == 0, again
    third = json.loads(runs("show", again.splitlines()[0], "--json")[1])
    assert third["stages"][0]["cache"] == "computed anew"
    code, compared = runs("diff", *names)
    assert code == 0
    assert "the same settings" in compared
    assert "same" in next(line for line in compared.splitlines() if line.startswith(" ingest"))


def test_an_input_that_the_storage_has_lost_is_named(backend, place, runs):
    from controlllm.config import load_config
    from tasks.prepare import prepare

    config = load_config(place / "tiny.yaml")
    inputs = {name: getattr(config, name) for name in ("mix", "pack", "validation")} | {"parts": []}
    name = launch(backend, "stage-prepare", prepare, base=place / "gone", data=place / "gone", **inputs)
    backend.wait(name)
    shown = json.loads(runs("show", name, "--json")[1])
    assert shown["state"] == "failed"
    assert "Error converting input" in shown["stages"][0]["error"]
    assert f"'{place / 'gone'}' is not a directory" in shown["stages"][0]["error"]


def test_mistakes_are_one_line(backend, runs, tmp_path, monkeypatch):
    code, said = runs("show", "nothing")
    assert (code, said.count("\n")) == (1, 1)
    assert "nothing: not in p/development" in said
    assert runs("rerun", "x")[1] == "error: rerun: say how, with one of --from STAGE, --recover and --relaunch\n"
    code, said = runs("ls", "--endpoint", "127.0.0.1:9", "--insecure")
    assert (code, said.count("\n")) == (1, 1)
    assert "127.0.0.1:9: Flyte does not answer; check FLYTECTL_CONFIG or --endpoint" in said
    monkeypatch.delenv("FLYTECTL_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    code, said = runs("ls")
    assert (code, said.count("\n")) == (1, 1)
    assert "no Flyte backend is set" in said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nights(backend, place, runs):
    """A scheduled run; the next night everything is cached; one stage on with another setting; what differs."""
    ((plan, _, first),) = backend.ticks(NIGHT.replace(hour=1), NIGHT)
    assert plan == "finetune-nightly"
    later = NIGHT.replace(day=30, hour=2, minute=0)
    assert backend.ticks(NIGHT.replace(hour=1), later)[0][2] == f"skipped: finetune-nightly: {first} is still running"
    record = backend.wait(first, seconds=3000)
    assert record.message.closure.phase == 4, record.message.closure.error.message
    home = place / "runs" / "tiny-2026-11-30-0200"
    assert "<svg" in (home / "report.html").read_text()
    assert (home / "model" / "config.json").exists()

    ((_, _, second),) = backend.ticks(NIGHT, NIGHT.replace(month=12, day=1))
    assert backend.wait(second, seconds=1500).message.closure.phase == 4
    cached = {
        name: node.message.closure.task_node_metadata.cache_status for name, node in stages(backend, second).items()
    }
    assert not cached.keys() & {"prepare", "train", "consolidate", "benchmark"}  # no pod: all from the cache
    assert (place / "runs" / "tiny-2026-12-01-0200" / "report.html").exists()

    code, name = runs("rerun", second, "--from", "train", "train.lr=0.002", "--wait")
    assert code == 0, name
    third = name.splitlines()[0]
    assert {"train", "consolidate"} <= stages(backend, third).keys()
    assert "prepare" not in stages(backend, third)
    shown = json.loads(runs("show", third, "--json")[1])
    assert shown["state"] == "succeeded"
    code, compared = runs("diff", second, third)
    assert code == 0, compared
    assert "0.002" in next(line for line in compared.splitlines() if "train.lr" in line)
    code, said = runs("rerun", third, "--from", "train", "train.stepz=3")
    assert code == 1
    assert "did you mean 'steps'" in said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_person_decides_and_what_was_refused_is_not_promoted(backend, place, runs):
    code, started = runs("start", "finetune-on-demand", place / "tiny.yaml", "promote.approval=true", "name=asked")
    assert code == 0, started
    name = started.strip()
    wait_for(lambda: (name, "approval") in backend.engine.signals, seconds=3000)
    assert f"waits for an answer: controlllm runs approve {name}" in runs("show", name)[1]
    assert runs("approve", name, "--refuse")[0] == 0
    assert "was not approved" in backend.wait(name).message.closure.error.message
    assert not (place / "runs" / "asked" / "model").exists()
    assert (place / "runs" / "asked" / "report.html").exists()

    code, again = runs("rerun", name, "--from", "benchmark")  # --recover would take the answer over
    assert code == 0, again
    wait_for(lambda: (again.strip(), "approval") in backend.engine.signals, seconds=600)
    assert runs("approve", again.strip())[0] == 0
    assert backend.wait(again.strip()).message.closure.phase == 4
    assert (place / "runs" / "asked" / "model" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_weekly_benchmark_measures_what_was_promoted(backend, place):
    sunday = datetime(2026, 12, 6, 4, 0, tzinfo=UTC)
    ticks = backend.ticks(sunday.replace(hour=3), sunday)
    ((plan, _, name),) = ticks
    assert plan == "benchmark-weekly"
    record = backend.wait(name, seconds=1500)
    assert record.message.closure.phase == 4, record.message.closure.error.message
    assert "puzzles" in (place / "runs" / "tiny" / "assessment.json").read_text()
