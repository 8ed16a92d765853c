"""One rank goes wrong, in any phase and way: all ranks are gone in time, with a line that names it and their stacks."""

import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path

import hanging
import pytest
import torch.distributed as dist
from ports import free_ports

from controlllm.train.distributed import World
from controlllm.train.peers import Beat, Heard, blame

pytestmark = pytest.mark.distributed

SECONDS = 8
HANGS = list(product(("sleep", "stop", "spin"), hanging.PHASES))
OTHERS = [("native", "data"), ("kill", "validate"), ("raise", "save"), ("stop the store", "data")]


def work(folder, rank, port, how, phase):
    with open(folder / f"{rank}.txt", "wb") as said:
        os.dup2(said.fileno(), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "3"}
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    wrong = 0 if how == "stop the store" else 1  # which lives in rank 0 here
    hanging.loop(World(rank, 3, rank), wrong=wrong, how=how, phase=phase, seconds=SECONDS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each rank wrote and its exit code, by (how, phase); all runs at the same time, for they only wait."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["controlllm.train.watchdog"])
    cases = HANGS + OTHERS
    folders = {case: tmp_path_factory.mktemp("-".join(case)) for case in cases}
    started = {}
    for case in cases:
        (port,) = free_ports(1)
        started[case] = [context.Process(target=work, args=(folders[case], rank, port, *case)) for rank in range(3)]
        for process in started[case]:
            process.start()
    until = time.monotonic() + 600  # starting so many takes a while
    for process in chain(*started.values()):
        process.join(max(until - time.monotonic(), 0.1))
    codes = {case: [process.exitcode for process in processes] for case, processes in started.items()}
    for process in chain(*started.values()):
        process.kill()
    return {case: (codes[case], [(folders[case] / f"{r}.txt").read_text() for r in range(3)]) for case in cases}


@pytest.mark.parametrize(("how", "phase"), HANGS)
def test_a_rank_that_hangs_ends_all(runs, how, phase):
    codes, said = runs[how, phase]
    assert codes == [1, 1, 1]
    lines = {line for text in said for line in text.splitlines() if line.startswith("error: ")}
    assert len(lines) == 1, lines
    line = lines.pop()
    named = f"rank 1 .*phase '{phase}' of step 3"
    assert re.match(rf"error: {named}.* \(train.guards.hang_seconds {SECONDS}\); every process stops$", line)
    assert f"rank 1, in phase '{phase}' of step 3" in said[1]
    assert "go_wrong" in said[1], "the stack of the one that hangs"
    assert all("in _watch" in text and "in loop" in text for text in said)


def test_a_frozen_store_holds_up_no_decision(runs):
    codes, said = runs["stop the store", "data"]
    assert codes == [1, 1, 1]
    line = "error: rank 0 has been in phase 'data' of step 3 for .* when the job's store at .* fell silent"
    assert re.match(line, said[1])
    assert re.match(line, said[2])
    assert "go_wrong" in said[0]


def test_a_call_that_keeps_the_interpreter_ends_all(runs):
    codes, said = runs["native", "data"]
    assert codes == [1, 1, 1]
    assert re.match("error: rank 1 .* in phase 'data' of step 3", said[0])
    assert "go_wrong" in said[1]


def test_a_killed_rank_ends_all(runs):
    codes, said = runs["kill", "validate"]
    assert codes == [1, -9, 1]
    assert re.match("error: rank 1 is gone: it was killed.* in phase 'validate' of step 3", said[0])


def test_a_rank_that_fails_alone_ends_all(runs):
    codes, said = runs["raise", "save"]
    assert codes == [1, 1, 1]
    assert "ValueError: only here" in said[1]
    assert "error: rank 1 ended with an error, and others wait for it: internal error: ValueError: only here" in said[0]


@pytest.mark.parametrize(("how", "phase"), [pytest.param("stop", "forward", marks=pytest.mark.slow), ("kill", "save")])
def test_nothing_is_left_under_torchrun(how, phase):
    script = str(Path(hanging.__file__))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([*command, how, phase, str(SECONDS)], env=environment, stderr=subprocess.PIPE, text=True)
    said = run.communicate(timeout=600)[1]  # ends when the last process that could write is gone
    assert run.returncode == 1
    assert re.search(f"error: rank 1 .*phase '{phase}' of step 3.*; every process stops", said), said
    assert "in _watch" in said


def heard(step, phases, phase="data", silent=0.0, exchanges=0):
    return Heard(Beat(1, step, phases, exchanges, phase, 70.0, "host", 1), at=1000.0 - silent)


@pytest.mark.parametrize(
    ("beats", "line"),
    [
        ([(5, 2), (5, 1), (5, 2)], "rank 1 has been in phase 'data' of step 5 for 70 s"),
        ([(4, 9), (5, 0), (5, 1)], "rank 0 has been in phase 'data' of step 4 for 70 s"),
        ([(5, 0), (5, 0), (5, 1)], "rank 0 has been in phase 'data' of step 5 for 70 s, as has rank 1"),
        ([(5, 1), (5, 1), (5, 1)], "rank 0 .*, as have the other 2: they wait for each other"),
        ([(5, 1, "save", 0.0, 9), (5, 1, "save", 0.0, 9), (5, 1, "save", 0.0, 8)], "rank 2 has been in phase 'save'"),
        ([(5, 1), (5, 1)], "rank 2 has not begun"),
        ([(5, 0), (5, 1), (5, 1, "save", 30.0)], "rank 2 was last heard of 30 s ago, in phase 'save' of step 5"),
    ],
)
def test_the_line_names_who_is_behind(beats, line):
    known = {rank: heard(*beat) for rank, beat in enumerate(beats)}
    assert re.match(line, blame(known, ranks={0, 1, 2}, now=1000.0))
