"""The trainer's benches in their smallest form: they run, and print what they are for."""

import json
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


@pytest.mark.slow
def test_loop_overhead():
    out = bench("loop_overhead", *TINY, "--rounds", "2")
    assert len(re.findall(r"^(?:CPU|wall): .* ratio \d+\.\d{3} ", out, re.MULTILINE)) == 2


@pytest.mark.slow
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


@pytest.mark.slow
def test_checkpoint_and_packing():
    out = bench("checkpoint", "--megabytes", "8", "--rounds", "1")
    (ratio,) = re.findall(r"^size E = 8 of 32: .* = ([\d.]+) \(bar 0.25\)", out, re.MULTILINE)
    assert float(ratio) <= 0.25
    assert "ratio" in bench("packed_padded", "2", "1")


def test_forgetting_is_measured_from_base_to_trained_and_between(tiny_base, store, tmp_path):
    tiny = [f"model.name={tiny_base}", "control.num_expanded=2", "pack.overlong=drop", "train.precision=float32"]
    arguments = ["forgetting/run", "--short", "--results", str(tmp_path), *tiny]
    assert "2 runs, 2 of them to do" in bench(*arguments)
    for name in ("full", "concat-lerp-mse"):
        points = json.loads((tmp_path / f"{name}_lr1e-3_seed0.json").read_text())["points"]
        assert [(p["step"], p["scale"]) for p in points] == [(0, 1), (5, 1), (10, 1), (10, 0.5)]
        assert points[0]["kl"] == {"chat": 0}
        base, _, trained, half = (p["new"] for p in points)
        assert trained < half < base
    assert (tmp_path / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    assert "2 runs, 0 of them to do" in bench(*arguments)


def test_forgetting_takes_the_least_at_equal_gain(tmp_path):
    def write(name, method, seed, *points):
        points = [
            {"scale": 1, "new": 1 - gain, "old": {"chat": 2 + old}, "kl": {"chat": kl}} for gain, old, kl in points
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps({"method": method, "seed": seed, "points": points}))

    write("gentle", "full", 0, (0, 0, 0), (0.5, 0.1, 0.1), (0.7, 0.2, 0.3))
    write("harsh", "full", 0, (0, 0, 0), (0.8, 0.8, 0.16), (0.7, 0.9, 0.9))
    write("other", "full", 1, (0, 0, 0), (0.8, 0.0, 0.32))
    bench("forgetting/show", "--results", str(tmp_path), "--levels", "0.4", "0.75", "0.9")
    rows = re.findall(r"^\| full \| (.*) \| 2 \|$", (tmp_path / "results.md").read_text(), re.MULTILINE)
    kl, old = (row.split(" | ") for row in rows)
    # On straight lines: the gentle run's 0.4/0.5 and the harsh one's 0.4/0.8 of a step, and the other seed's.
    assert kl == ["0.120 ± 0.057", "0.225 ± 0.106", "–"]
    assert old[0] == "0.040 ± 0.057"
