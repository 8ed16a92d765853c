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


def result(store: Path) -> dict[str, torch.Tensor]:
    (folder,) = (store / "train").glob("[!.]*")
    return load_file(folder / "trained.safetensors")


@pytest.mark.slow
def test_two_are_one(recipe, store, tmp_path, monkeypatch):
    """With shares that are not equal; the ways of training and sharing are compared in test_parallel.py."""
    changes = ["control={num_expanded: 2, interpolation: moe_hard, teacher: trajectory}", "train.global_batch_size=3"]
    train(recipe, *changes)
    with monkeypatch.context() as patch:  # else they would find what one has made
        patch.setenv("CONTROLLLM_CACHE", str(tmp_path / "other"))
        train(recipe, *changes, processes=2)
        again = train(recipe, *changes, processes=2)
    assert "train         cached" in again  # every process finds it
    one, two = result(store), result(tmp_path / "other")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-6, rtol=1e-4)
