"""`controlllm train` that is stopped by a signal, or killed: the same command goes on, and the result is the same."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import stopping_run
from killed_runs import lines, same_to_the_bit, trained

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("store")]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SHORT = ["train.steps=16", "train.checkpoint.every=5", "validation.every=8"]
LONG = ["train.steps=60", "train.checkpoint.every=5", "validation.every=20"]
"""Enough to be met on the way."""
COMMAND = ["-m", "controlllm.cli"]
STOPPING = stopping_run.__file__


def start(recipe, changes, *, processes=1, program=COMMAND):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = TWO if processes == 2 else []
    return subprocess.Popen(
        [sys.executable, *launcher, *program, "train", str(recipe), *changes], stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def finish(recipe, changes, *, processes=1):
    process = start(recipe, changes, processes=processes)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said[-3000:]
    return said


def kill(process):
    """With all that it started; a launcher's processes are in sessions of their own."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.communicate()


def running(store: Path) -> Path:
    """The folder of a run that is not over, once it has made a few steps."""
    until = time.monotonic() + 600
    while time.monotonic() < until:
        for folder in (store / "train").glob(".*.partial"):
            if len(lines(folder)) > 10:
                return folder
        time.sleep(0.02)
    raise AssertionError("no run has begun")


def result(store: Path) -> Path:
    return next(folder for folder in (store / "train").iterdir() if (folder / "lineage.json").exists())


@pytest.fixture
def uninterrupted(recipe, tmp_path, monkeypatch):
    """The same run, whole, in a store of its own; by the number of processes."""

    def make(processes):
        with monkeypatch.context() as patch:
            patch.setenv("CONTROLLLM_CACHE", str(tmp_path / "other"))
            finish(recipe, LONG, processes=processes)
        return result(tmp_path / "other")

    return make


@pytest.mark.parametrize("trainer", ["native", pytest.param("transformers", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=pytest.mark.slow)])
def test_a_signal_saves_and_stops(recipe, store, name, code, trainer):
    short = [*SHORT, f"train.trainer={trainer}"]
    process = start(recipe, short, program=[STOPPING, name, "self"])
    said = process.communicate(timeout=600)[1]
    assert process.returncode == code
    assert "Traceback" not in said
    stopped = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(stopped) == 1
    assert f"stopped by {name} after step {stopping_run.STEP}," in stopped[0]
    assert f"going on after step {stopping_run.STEP}" in finish(recipe, short)
    assert json.loads((result(store) / "train.json").read_text())["resumed"] == [stopping_run.STEP]


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_to_the_launcher_saves_and_stops(recipe, name):
    process = start(recipe, SHORT, processes=2, program=[STOPPING, name, "launcher"])
    said = process.communicate(timeout=600)[1]
    assert process.returncode != 0
    stopped = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(stopped) == 1, said
    assert f"stopped by {name} after step {stopping_run.STEP}," in stopped[0]
    assert f"going on after step {stopping_run.STEP}" in finish(recipe, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_started_again(recipe, store, uninterrupted, processes):
    for _ in range(2):
        process = start(recipe, LONG, processes=processes)
        running(store)
        kill(process)
    said = finish(recipe, LONG, processes=processes)
    assert "going on after step" in said
    whole = uninterrupted(processes)
    same_to_the_bit(trained(result(store)), trained(whole))
    assert lines(result(store)) == lines(whole)
    assert "cached" in finish(recipe, LONG, processes=processes), "a finished run trains no step"
