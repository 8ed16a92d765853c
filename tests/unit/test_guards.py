"""Guards of a run: not-finite steps, memory, requests to stop, pdb, and the launch file."""

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from controlllm.config import DatasetConfig, MixConfig, PackConfig, TrainConfig
from controlllm.data.build import make_job, prepare_dataset
from controlllm.data.loader import Mix
from controlllm.data.manifest import list_source
from controlllm.data.shelf import StoredShelf
from controlllm.errors import UserError
from controlllm.train.distributed import World
from controlllm.train.guards import FiniteGuard, out_of_memory, sample_names, step_samples
from controlllm.train.stopping import Stopped, StopRequest
from controlllm.train.watchdog import Watchdog

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ODD = st.sampled_from([1.0, math.nan, math.inf, -math.inf])


@given(st.lists(st.tuples(ODD, ODD), max_size=20), st.integers(0, 4))
def test_a_step_is_applied_exactly_when_all_is_finite(steps, limit):
    guard, in_a_row = FiniteGuard(limit, announce=False), 0
    for step, (loss, norm) in enumerate(steps):
        finite = math.isfinite(loss) and math.isfinite(norm)
        in_a_row = 0 if finite else in_a_row + 1
        again = FiniteGuard(limit, announce=False)
        again.load(json.loads(json.dumps(guard.state())))
        guard = again
        if in_a_row > limit:
            with pytest.raises(UserError, match=f"step {step}: .*max_skipped {limit}.*train.lr.*a:x.jsonl:3"):
                guard.check(step, loss=loss, grad_norm=norm, samples=lambda: ["a:x.jsonl:3"])
            return
        assert guard.check(step, loss=loss, grad_norm=norm, samples=lambda: ["a:x.jsonl:3"]) is finite


def test_a_step_left_out_is_one_line(capsys):
    guard = FiniteGuard(1)
    assert guard.check(6, loss=2.5, grad_norm=1.0, samples=pytest.fail)
    assert not guard.check(7, loss=2.5, grad_norm=math.nan, samples=lambda: ["a:x.jsonl:3", "a:x.jsonl:9"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "step 7 is left out (1 of at most 1 in a row): gradient norm nan is not finite (loss 2.5)" in said
    assert "a:x.jsonl:3; a:x.jsonl:9" in said


@pytest.fixture
def mix(tiny_base, tmp_path):
    """40 conversations in units of about 10, one packed row each."""
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"#{i}#" + "a" * 20}]}
        for i in range(40)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DatasetConfig.model_validate(
        {"name": "mine", "source": str(tmp_path / "chat.jsonl"), "format": "messages"}
    )
    pack = PackConfig.model_validate({"context_length": 128, "unit_rows": 10, "validation_fraction": 0.0})
    manifest = list_source(config.source, unit_rows=pack.unit_rows)
    job = make_job(config, manifest, tokenizer_folder=tiny_base, pack=pack)
    made = prepare_dataset(job, manifest, shards=tmp_path / "shards", workers=1)
    return Mix([StoredShelf("mine", made.units, str(tmp_path / "shards"))], MixConfig(datasets=[config]), pack)


def test_samples_are_named_by_the_line_they_come_from(mix, tokenizer, tmp_path):
    lines = (tmp_path / "chat.jsonl").read_text().splitlines()
    seen = set()
    for position in range(mix.epoch_rows):
        text = tokenizer.decode(mix.row(position)["input_ids"])
        for name in sample_names(mix, [position]):
            dataset, file, line = name.rsplit(":", 2)
            assert (dataset, file) == ("mine", str(tmp_path / "chat.jsonl"))
            assert re.search(r"#\d+#", lines[int(line) - 1])[0] in text
            seen.add(int(line))
    assert seen == set(range(1, 41))


def test_only_the_micro_batch_whose_loss_is_not_finite_is_named(mix):
    named = step_samples(mix, [[0], [1], [2]], [1.0, math.nan, 2.0], world=World())
    assert named == [f"rank 0, micro-batch 1: {', '.join(sample_names(mix, [1]))}"]
    every = step_samples(mix, [range(mix.epoch_rows)], [1.0], world=World())
    assert len(every) == 9
    assert every[-1] == "and 32 more"


CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 5.62 MiB is "
    "free. Including non-PyTorch memory, this process has 79.08 GiB memory in use."
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError(CUDA), "(20.00 MiB wanted, 5.62 MiB free)"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4398046511104 bytes."),
            "(4 T",
        ),
        (RuntimeError("CUDA error: out of memory"), "; change"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "; change"),
        (MemoryError(), "; change"),
    ],
)
def test_memory_that_is_not_there_says_what_to_change(error, said):
    line = str(out_of_memory(error, TrainConfig(micro_batch_size=8), context_length=4096, device=CPU))
    assert line.startswith("out of memory on the machine (CPU)")
    assert said in line
    places = [line.index(key) for key in ("micro_batch_size 8 -> 4", "activation_checkpointing none -> selective",
              "parallel.kind ddp -> fsdp", "adamw -> adamw_8bit", "pack.context_length 4096 -> 2048")]  # fmt: skip
    assert places == sorted(places)


def test_the_cpu_allocator_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    line = str(out_of_memory(raised.value, TrainConfig(), context_length=64, device=CPU))
    assert "1.15e+18" not in line
    assert "wanted" in line


def test_only_what_can_still_be_changed_is_named():
    config = TrainConfig.model_validate(
        {
            "micro_batch_size": 1,
            "activation_checkpointing": "full",
            "parallel": {"kind": "fsdp", "cpu_offload": True},
            "optimizer": {"name": "adamw_8bit"},
        }
    )
    line = str(out_of_memory(MemoryError(), config, context_length=512, device=torch.device("cuda", 1)))
    assert line == "out of memory on cuda:1; change, in this order: pack.context_length 512 -> 256"
    odd = TrainConfig(micro_batch_size=9, global_batch_size=9)
    assert "micro_batch_size 9 -> 3" in str(out_of_memory(MemoryError(), odd, context_length=8, device=CPU))


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_are_left_alone(error):
    assert out_of_memory(error, TrainConfig(), context_length=64, device=CPU) is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_noted_and_the_handlers_come_back(number, code):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        signal.raise_signal(number)  # a launcher's, of the same Ctrl-C
        assert stop.signal == number.name
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    stopped = Stopped(stop.signal, 37)
    assert stopped.code == code
    assert str(stopped) == f"stopped by {number.name} after step 37, saved; the same command goes on from there"


def test_the_second_interrupt_is_at_once(monkeypatch):
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        later = time.monotonic() + 2
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_threads_set_no_handlers():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


LOOP = """
import torch
from controlllm.train.debugging import post_mortem, stop_before_first_step
from controlllm.train.distributed import World, processes
def train(world):
    first = "the step"
    stop_before_first_step(world, world.size - 1)
    second = len(first) * int(world.sum(torch.ones(1)))
    if world.rank == world.size - 1:
        raise RuntimeError("went wrong")
with processes(timeout_seconds=100) as world, post_mortem(world, world.size - 1):
    train(world)
"""


def debug(folder, typed, *launcher):
    (folder / "loop.py").write_text(LOOP)
    command = [sys.executable, *launcher, str(folder / "loop.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, input=typed, capture_output=True, text=True, env=environment, timeout=600)


def test_pdb_stops_in_the_loop_and_where_it_went_wrong(tmp_path):
    run = debug(tmp_path, "p first.upper()\nc\np second + 34\nq\n")
    assert "'THE STEP'" in run.stdout
    assert "42" in run.stdout
    assert "RuntimeError: went wrong" in run.stderr
    assert run.returncode == 1


def test_pdb_stops_in_one_rank_while_the_others_wait(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run = debug(tmp_path, "p world.rank + 70\nn\nn\np second + 61\nc\nq\n", *launcher)
    assert "71" in run.stdout, "rank 1"
    assert "77" in run.stdout, "the sum over both ranks, step by step"
    assert "RuntimeError: went wrong" in run.stderr


def test_without_a_terminal_it_goes_on(tmp_path):
    run = debug(tmp_path, "")
    assert run.stdout.count("no more input for pdb: going on") == 2
    assert run.stderr.rstrip().endswith("RuntimeError: went wrong")


def test_a_rank_that_is_not_there_is_refused():
    from controlllm.train.debugging import stop_before_first_step

    with pytest.raises(UserError, match="--rank 2: there are ranks 0 to 0"):
        stop_before_first_step(World(), 2)


HANG = """
import math, sys, time
from controlllm.train.distributed import World
from controlllm.train.watchdog import Watchdog
with Watchdog(World(), seconds=float(sys.argv[1])) as dog:
    dog.phase("data", 7)
    end = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < end:
        time.sleep(float(sys.argv[2]))
        dog.phase("data", 7)
print("done")
"""


@pytest.mark.parametrize(
    ("seconds", "pause", "lasts", "hangs"),
    [("1", "600", "1", True), ("4", "0.1", "5.5", False), ("inf", "0.1", "0.1", False)],
)
def test_one_process_alone_is_watched(seconds, pause, lasts, hangs):
    run = subprocess.run([sys.executable, "-c", HANG, seconds, pause, lasts], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == int(hangs)
    assert run.stdout == ("" if hangs else "done\n")
    line = r"error: rank 0 has been in phase 'data' of step 7 for \d+ s \(train.guards.hang_seconds 1\); every"
    assert bool(re.match(line, run.stderr)) is hangs


def test_an_infinite_watchdog_starts_nothing():
    before = threading.active_count()
    with Watchdog(World(), seconds=math.inf) as dog:
        dog.phase("data", 1)
        assert threading.active_count() == before


def test_the_launch_file_starts_what_exists():
    launches = json.loads((ROOT / ".vscode" / "launch.json").read_text())["configurations"]
    assert [launch["name"] for launch in launches] == ["train (1 process)", "train (2 ranks)"]
    for launch in launches:
        words = launch["args"]
        modules = [launch["module"], *[words[i + 1] for i, word in enumerate(words) if word == "--module"]]
        assert modules[-1] == "controlllm.cli"
        assert all(importlib.util.find_spec(module) for module in modules)
        recipe, *changes = words[words.index("train") + 1 :]
        from controlllm.config import load_config

        assert load_config(os.fspath(ROOT / recipe), *changes).train.guards.hang_seconds == 86400
