"""The loopback backend itself, on a small workflow: what tests of runs on it rely on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backend import Backend
from backend.engine import wait_for
from flyteidl.core import literals_pb2

pytestmark = pytest.mark.flow
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    """With the toy registered, by the command that a user gives."""
    with Backend.running(tmp_path_factory.mktemp("backend"), {"PYTHONPATH": str(HERE)}) as running:
        done = pyflyte(running, "register", "-p", "p", "--copy", "none", "--version", "1", "toy.py")
        assert done.returncode == 0, done.stderr[-3000:]
        yield running


def pyflyte(backend, *arguments):
    program = Path(sys.executable).with_name("pyflyte")
    environment = {**os.environ, "FLYTECTL_CONFIG": str(backend.config), "TMPDIR": str(backend.folder)}
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def remote(backend):
    from flytekit.configuration import Config
    from flytekit.remote import FlyteRemote

    config = Config.for_endpoint(backend.endpoint, insecure=True)
    return FlyteRemote(config, default_project="p", default_domain="development")


def launch(remote, folder, *, numbers, ask=False):
    inputs = {"numbers": numbers, "ask": ask, "folder": str(folder)}
    return remote.execute(remote.fetch_launch_plan(name="toy.toy", version="1"), inputs=inputs).id.name


def ran(folder) -> list[str]:
    return (folder / "log").read_text().splitlines()


def test_a_task_is_tried_again_after_an_outage_and_a_lost_machine_and_recovered_after_a_mistake(
    backend, remote, tmp_path
):
    name = launch(remote, tmp_path, numbers=[1, -3])
    failed = backend.wait(name)
    assert "number: must not be negative, found -4" in failed.message.closure.error.message
    assert ran(tmp_path) == ["doubled 1", "doubled -3", "shaky", "shaky", "shaky", "strict"]  # a mistake: tried once

    (tmp_path / "forgiving").touch()
    again = remote.client.recover_execution(failed_id(remote, name)).name
    recovered = backend.wait(again)
    assert recovered.outputs.literals["o0"].scalar.primitive.integer == -4
    assert ran(tmp_path)[6:] == ["strict"]  # what had succeeded is taken over


def failed_id(remote, name):
    from flytekit.models.core.identifier import WorkflowExecutionIdentifier

    return WorkflowExecutionIdentifier(remote.default_project, remote.default_domain, name)


@pytest.mark.slow
def test_a_gate_waits_for_an_answer_and_items_of_a_map_are_cached_one_by_one(backend, remote, tmp_path):
    from backend.records import CACHE

    (tmp_path / "log").write_text("shaky\nshaky\n")
    first = backend.wait(launch(remote, tmp_path, numbers=[5]))
    assert first.outputs.literals["o0"].scalar.primitive.integer == 10

    second = launch(remote, tmp_path, numbers=[5, 6], ask=True)
    wait_for(lambda: (second, "approval") in backend.engine.signals, seconds=120)
    assert not backend.executions[second].ended.is_set()
    remote.set_input("approval", second, True)
    assert backend.wait(second).outputs.literals["o0"].scalar.primitive.integer == 22
    array = next(node for node in backend.executions[second].nodes.values() if node.message.metadata.is_array)
    items = [each for task in array.tasks for each in task.closure.metadata.external_resources]
    assert [each.cache_status for each in items] == [CACHE.CACHE_HIT, CACHE.CACHE_POPULATED]


@pytest.mark.slow
def test_a_run_from_the_command_line_ships_its_code(backend, tmp_path):
    done = pyflyte(
        backend,
        "run",
        "--remote",
        "-p",
        "p",
        "-d",
        "development",
        "toy.py",
        "once",
        "--number",
        4,
        "--folder",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    name = next(reversed(backend.executions))
    assert backend.wait(name).outputs.literals["o0"].scalar.primitive.integer == 8
    task = next(reversed(backend.registry.tasks.values())).template
    assert task.container.args[0] == "pyflyte-fast-execute"


def test_a_wrong_launch_is_refused(backend, remote):
    from flytekit.exceptions.user import FlyteInvalidInputException

    plan = remote.fetch_launch_plan(name="toy.toy", version="1")
    with pytest.raises(FlyteInvalidInputException):
        remote.client.create_execution("p", "development", "", spec_of(plan), literal_map({}))


def spec_of(plan):
    from flytekit.models.execution import ExecutionMetadata, ExecutionSpec

    return ExecutionSpec(plan.id, ExecutionMetadata(ExecutionMetadata.ExecutionMode.MANUAL, "test", 0))


def literal_map(values):
    from flytekit.models.literals import LiteralMap

    return LiteralMap.from_flyte_idl(literals_pb2.LiteralMap(literals=values))
