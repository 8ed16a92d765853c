"""The trainer's benches in their smallest form: they run, and print what they are for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
SIZES = {"layers": 4, "hidden": 32, "intermediate": 64, "heads": 4, "kv-heads": 2, "vocabulary": 128, "tokens": 64}
TINY = [part for name, size in SIZES.items() for part in (f"--{name}", str(size))]


def bench(name, *arguments):
    command = [sys.executable, str(BENCH / f"{name}.py"), *arguments]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_loop_overhead():
    out = bench("loop_overhead", *TINY, "--rounds", "2")
    assert len(re.findall(r"^(?:CPU|wall): .* ratio \d+\.\d{3} ", out, re.MULTILINE)) == 2


@pytest.mark.distributed
def test_wire_bytes_are_those_of_the_trained_share():
    out = bench("wire_bytes", "--hidden", "32")
    ratios = [float(found) for found in re.findall(r"^ratio, frozen replicated, .*: ([\d.]+) \(bar", out, re.MULTILINE)]
    assert len(ratios) == 2
    assert all(1 <= ratio <= 1.02 for ratio in ratios)
    assert "4 micro-batches to 1: 1.0000" in out


def test_gpu_step_runs_where_there_is_no_gpu():
    out = bench("gpu_step", "--device", "cpu", *TINY, "--experts", "2", "--document", "20", "--steps", "2")
    assert "device: CPU: no figure of a GPU" in out
    assert re.search(r"^peak / predicted \(bar 1.08\): [\d.]+$", out, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.distributed
def test_fsdp_peer_loses_the_same():
    out = bench("fsdp_peer", *TINY, "--rounds", "1", "--steps", "2", "--cases", "control-float32")
    (apart,) = re.findall(r"differ by at most (\S+)", out)
    assert float(apart) < 1e-5
    assert re.search(r"^peer \(FSDP2 in \d+ parts\)", out, re.MULTILINE)
    assert re.search(r"^ratio control-float32: tokens/s [\d.]+ ", out, re.MULTILINE)


def test_checkpoint_and_packing():
    out = bench("checkpoint", "--megabytes", "8", "--rounds", "1")
    (ratio,) = re.findall(r"^size E = 8 of 32: .* = ([\d.]+) \(bar 0.25\)", out, re.MULTILINE)
    assert float(ratio) <= 0.25
    assert "ratio" in bench("packed_padded", "2", "1")
