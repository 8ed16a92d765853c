"""Several processes in a Flyte task: one that is killed makes the task be tried again, a mistake does not.

Without a cluster a mistake is one line.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys
from flytekit import task
from flytekit.bin.entrypoint import setup_execution
from flytekit.exceptions.user import FlyteRecoverableException
from controlllm.errors import Outage, UserError
from tasks.artifacts import one_line_errors
from tasks.elastic import Processes

@task(task_config=Processes(nproc_per_node=2, start_method="spawn", increase_shared_mem=False, monitor_interval=1))
@one_line_errors
def train(how: str) -> int:
    if os.environ["RANK"] == "1":
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "watchdog":
            os._exit(1)
        raise {"outage": Outage, "mistake": UserError}[how]("train.lr: said by rank 1")
    import time
    time.sleep(60)
    return 0

def in_a_pod(how):
    with setup_execution(raw_output_data_prefix="raw"):
        train.execute(how=how)

if __name__ == "__main__":
    if sys.argv[1] == "here":
        train(how=sys.argv[2])
    for how in sys.argv[1:]:
        try:
            in_a_pod(how)
        except FlyteRecoverableException as error:
            print(how, "recoverable", " ".join(str(error).split()), flush=True)
        except Exception as error:
            print(how, "final", type(error).__name__, flush=True)
"""


def program(tmp_path, *arguments):
    file = tmp_path / "lost.py"
    file.write_text(PROGRAM)
    command = [sys.executable, "-W", "ignore", file, *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)


def test_a_mistake_in_a_local_run_is_one_line(tmp_path):
    done = program(tmp_path, "here", "mistake")
    assert done.returncode == 1
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "Failed to load" not in line] == [
        "error: train.lr: said by rank 1"
    ]


def test_a_killed_process_is_tried_again_and_a_mistake_is_not(tmp_path):
    done = program(tmp_path, "killed", "watchdog", "outage", "mistake")
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        ["killed", "recoverable"],
        ["watchdog", "recoverable"],
        ["outage", "recoverable"],
        ["mistake", "final"],
    ], done.stderr[-3000:]
    assert "rank 1 was lost (SIGKILL)" in lines[0][2]
    assert "rank 1 was lost (exit code 1)" in lines[1][2]
