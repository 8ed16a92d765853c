"""One rank of two stops, in any phase of a real run: both are out in time, with a line that names it (T9)."""

import os
import re
import signal
import time
from datetime import timedelta
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from hanging import PATIENT, wait_until_all_heard
from killed_runs import inputs_of, pack
from ports import free_ports
from ranks import PRELOADED

from controlllm.train import checkpoint, fit
from controlllm.train.distributed import World
from controlllm.train.watchdog import Watchdog

pytestmark = pytest.mark.distributed
SECONDS = 8
PHASES = ("data", "forward", "save", "validate")
CASES = [(how, phase) for how in ("sleep", "stop") for phase in PHASES] + [("sleep", "write")]
WATCHED = {"every": 1, "rows": 2}


def work(rank, port, inputs, folder, how, phase):
    with open(folder / f"{rank}.txt", "wb") as said:
        os.dup2(said.fileno(), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    go_wrong(rank, how, phase)
    (folder / "run").mkdir(exist_ok=True)
    fit.fit(inputs, World(rank, 2, rank), folder / "run", "key", {"run": 1})


def go_wrong(rank, how, phase):
    """Rank 1, in this phase of step 3; or in the thread that writes its checkpoint."""
    plain = Watchdog.phase

    def halt(*_):
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(3600)

    def note(self, name, step):
        plain(self, name, step)
        if phase == "write" and step == 3:
            self.seconds = SECONDS
        elif (name, step) == (phase, 3):
            Watchdog.phase = plain
            wait_until_all_heard(self, 1, step, name, SECONDS)
            if rank == 1:
                halt()

    Watchdog.phase = note
    if phase == "write" and rank == 1:
        checkpoint.write_shard = halt


@pytest.fixture(scope="module")
def runs(tiny_base, tmp_path_factory):
    """What each rank wrote and its exit code, by case; all runs at the same time, for they only wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTROLLLM_CACHE", str(tmp_path_factory.mktemp("store")))
        shards = pack(tiny_base)
    changes = {"guards": {"hang_seconds": PATIENT}, "checkpoint": {"every": 2}, "global_batch_size": 2}
    inputs = inputs_of(tiny_base, shards, watched=WATCHED, **changes)
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folders = {case: tmp_path_factory.mktemp("-".join(case)) for case in CASES}
    started = {}
    for case in CASES:
        (port,) = free_ports(1)
        started[case] = [
            context.Process(target=work, args=(rank, port, inputs, folders[case], *case)) for rank in range(2)
        ]
        for process in started[case]:
            process.start()
    until = time.monotonic() + 600  # starting so many takes a while
    everyone = [process for both in started.values() for process in both]
    for process in everyone:
        process.join(max(until - time.monotonic(), 0.1))
    codes = {case: [process.exitcode for process in both] for case, both in started.items()}
    for process in everyone:
        process.kill()
    return {case: (codes[case], [(folders[case] / f"{rank}.txt").read_text() for rank in range(2)]) for case in CASES}


@pytest.mark.parametrize(("how", "phase"), CASES)
def test_both_are_out_and_the_one_is_named(runs, how, phase):
    codes, said = runs[how, phase]
    assert codes == [1, 1], said
    found = {line for text in said for line in text.splitlines() if line.startswith("error: ")}
    assert len(found) == 1, found
    named, step = ("save", r"\d+") if phase == "write" else (phase, "3")
    pattern = rf"error: rank 1 .*phase '{named}' of step {step}.* \(train.guards.hang_seconds {SECONDS}\)"
    assert re.match(pattern, found.pop())
    assert "halt" in said[1], "the stack of the one that hangs"
    assert all("in _watch" in text for text in said)
