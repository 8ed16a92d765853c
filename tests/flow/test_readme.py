"""Every command of the README is run: the light ones here, the demo's in the slow suite."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.flow
ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
LIGHT = [command for command in COMMANDS if "make" not in command and "runs/demo" not in command]
MAKE = [command for command in COMMANDS if "make" in command]
TUNED = [command for command in COMMANDS if "runs/demo" in command]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the light commands find what those before them made."""
    return tmp_path_factory.mktemp("readme")


def run(command, tmp_path, **environment):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"PATH": path, "CONTROLLLM_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path), **environment}
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **settings}
    )


def test_the_readme_has_commands():
    assert len(LIGHT) >= 6
    assert {"make finetune", "make test"} <= set(MAKE)


@pytest.mark.parametrize("command", LIGHT)
def test_light_commands(command, folder):
    done = run(command, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout or done.stderr


@pytest.mark.parametrize("command", MAKE)
def test_make_knows_its_targets(command, tmp_path):
    """What would be run; whether it works is the next test's question."""
    done = run(re.sub(r"\bmake\b", "make -n", command), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_demo_and_what_follows(tmp_path):
    """All of the README's make commands but `make test`, which is running this, in order and in one store."""
    for command in (command for command in MAKE if shlex.split(command)[-1] != "test"):
        done = run(command, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "report.html" in done.stderr
    shutil.rmtree(ROOT / "runs" / "demo" / "folded", ignore_errors=True)
    for command in TUNED:
        done = run(command, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
