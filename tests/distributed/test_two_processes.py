"""Two real processes over gloo train what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("store")]
LAUNCH = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]


def train(recipe, *overrides, processes=1):
    command = [
        sys.executable,
        *(LAUNCH if processes > 1 else []),
        "-m",
        "controlllm.cli",
        "train",
        str(recipe),
        *overrides,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def results(store: Path) -> list[dict[str, torch.Tensor]]:
    folders = sorted((store / "train").glob("[!.]*"), key=lambda f: f.stat().st_mtime)
    return [load_file(folder / "trained.safetensors") for folder in folders]


@pytest.mark.parametrize("control", [
    "{num_expanded: 2}",
    "{layout: hybrid, num_expanded: 2, interpolation: dlerp, divergence: cosine}",
    "{num_expanded: 2, interpolation: moe_hard, teacher: trajectory}",
])  # fmt: skip
def test_two_are_one(recipe, store, control):
    train(recipe, f"control={control}")
    train(recipe, f"control={control}", processes=2)
    one, two = results(store)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-6, rtol=1e-4)
    again = train(recipe, f"control={control}", processes=2)
    assert "train         cached" in again  # every process finds it


def test_unequal_shares_are_refused_in_one_line(recipe):
    command = [sys.executable, *LAUNCH, "-m", "controlllm.cli", "train", str(recipe), "train.global_batch_size=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "cannot be shared equally by 2 processes" in done.stderr
