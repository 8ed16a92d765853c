"""Training settings as a user gives them: each trains, changes what it should and nothing else."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from controlllm import pipeline
from controlllm.cli import main
from controlllm.config import load_config
from controlllm.errors import UserError

QUIET = ("Warning", "warning", "Failed to load", "deprecated", "it/s]", "Traceback", "fatal")


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    """Base, rows and shards are made once for this file; each setting trains anew."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(recipe, shared_store, monkeypatch):
    """train("KEY=VALUE", ...) → the folder of the finished training."""
    monkeypatch.setenv("CONTROLLLM_CACHE", str(shared_store))

    def run(*overrides):
        shutil.rmtree(shared_store / "train", ignore_errors=True)  # means are no part of a run's name
        pipeline.run(load_config(recipe, "validation=null", "train.steps=3", *overrides), until="train")
        (folder,) = (shared_store / "train").glob("[!.]*")
        return folder

    return run


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["cross_entropy"] for row in rows if "cross_entropy" in row]


@pytest.fixture(scope="module")
def plain():
    """What the recipe without changes gives, filled by the first test that needs it."""
    return {}


def reference(train, plain):
    if not plain:
        folder = train()
        plain["losses"], plain["tensors"] = losses(folder), load_file(folder / "trained.safetensors")
    return plain


@pytest.mark.parametrize(("override", "tolerance"), [
    ("train.activation_checkpointing=full", 0),
    ("train.activation_checkpointing=selective", 0),
    ("train.checkpoint.asynchronous=false", 0),
    ("train.kernels=torch", 0),
    ("train.precision=bf16", 0.02),
    ("train.precision=bf16_stochastic", 0.02),
    ("train.precision=bf16_kahan", 0.02),
    ("train.precision=fp16", 0.02),
    ("train.micro_batch_size=2", 1e-5),
    ("model.attention=sdpa", 1e-5),
    ("model.attention=eager", 1e-5),
])  # fmt: skip
def test_the_same_curve_by_other_means(train, plain, override, tolerance):
    wanted = reference(train, plain)
    folder = train(override)
    assert losses(folder) == pytest.approx(wanted["losses"], abs=tolerance)
    assert load_file(folder / "trained.safetensors").keys() == wanted["tensors"].keys()


@pytest.mark.parametrize("override", [
    "train.lr=0.01",
    "train.optimizer.alpha_lr=0.1",
    "train.schedule.warmup_steps=2",
    "train.schedule.final_fraction=1",
    "train.optimizer.weight_decay=0.5",
])  # fmt: skip
def test_another_run(train, plain, override):
    """The first step sees the same weights; what comes out is something else."""
    wanted = reference(train, plain)
    folder = train(override)
    assert losses(folder)[0] == wanted["losses"][0]
    tensors = load_file(folder / "trained.safetensors")
    assert any(not torch.equal(tensors[name], wanted["tensors"][name]) for name in tensors)


def test_frozen_weights_in_bfloat16(train):
    """8B models are run like this: the check for leaks, too, computes in the run's precision."""
    folder = train("model.dtype=bfloat16", "train.precision=bf16")
    assert all(tensor.dtype == torch.float32 for tensor in load_file(folder / "trained.safetensors").values())


@pytest.mark.parametrize(("section", "names"), [
    ("partial={num_blocks: 2}", {"2", "3"}),
    ("partial={num_blocks: 2, blocks: bottom}", {"0", "1"}),
    ("partial={num_blocks: 2, blocks: [0, 3]}", {"0", "3"}),
    ("lora={rank: 4, target_modules: [q_proj]}", {"0", "1", "2", "3"}),
])  # fmt: skip
def test_only_what_the_method_says_is_trained(train, section, names):
    tensors = load_file(train("control=null", section) / "trained.safetensors")
    assert {name.split("layers.")[1].split(".")[0] for name in tensors} == names
    assert ("lora" in section) == all("lora_" in name for name in tensors)


def test_a_run_measured_in_tokens(train):
    folder = train("train.steps=null", "train.tokens=1200", "train.schedule.warmup_tokens=300")
    made = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert made[-1]["tokens_seen"] >= 1200 > made[-2]["tokens_seen"]


def test_windows_of_steps_that_do_not_divide_the_run(train):
    folder = train("train.metrics.every=3", "train.steps=7", "train.metrics.trackers=[tensorboard]")
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 7]
    assert list((folder / "tensorboard").rglob("events.*"))


def test_a_metric_that_is_not_measured_is_told_before_the_first_step(train, shared_store):
    with pytest.raises(UserError, match=r"validation\.best\.metric: 'rougeL' is not measured"):
        train("validation={every: 2, rows: 1, best: {metric: rougeL}}")
    (left,) = shared_store.glob("train/.*.partial")
    assert losses(left) == []


def test_checkpoints_elsewhere_belong_to_their_run(train, tmp_path):
    folder = f"train.checkpoint.folder={tmp_path / 'checkpoints'}"
    train(folder, "train.checkpoint.every=1", "train.checkpoint.keep=1", "train.checkpoint.keep_every=2")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    with pytest.raises(UserError, match=r"of another run: train\.lr is 0\.001 there and 0\.002 here"):
        train(folder, "train.lr=0.002")


@pytest.mark.parametrize(("override", "says"), [
    ("train.micro_batch_size=3", "global_batch_size 2 is not a multiple of micro_batch_size 3"),
    ("train.precision=bf17", "train.precision"),
    ("train.tokens=100", "set steps to null to use tokens"),
    ("train.parallel={kind: fsdp}", "start with torchrun"),
    ("train.kernels=liger", "train.kernels liger needs a GPU"),
    ("train.precision=float8", "train.precision float8 needs a GPU"),
    ("model.dtype=bfloat16", "set model.dtype to float32, too"),
    ("model.attention=flex_attention", "no backward pass on a CPU"),
    ("model.attention=flash_attention_2", "needs a GPU and the package flash-attn"),
    ("lora.rank=4", "control and lora exclude each other"),
])  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a GPU could do")
def test_wrong_settings_are_one_line(recipe, shared_store, monkeypatch, capsys, override, says):
    monkeypatch.setenv("CONTROLLLM_CACHE", str(shared_store))
    assert main(["train", str(recipe), override]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert "internal error" not in line


def test_what_a_person_reads(recipe, shared_store):
    """What is trained, how far and where, then validations; nothing of libraries."""
    environment = {**os.environ, "CONTROLLLM_CACHE": str(shared_store), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "controlllm.cli", "train", str(recipe), "train.seed=7"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = done.stderr
    assert done.returncode == 0, said
    assert "parameters trained (2 twins, concat, at blocks 1, 3) · 1 process on cpu · float32 · about 0." in said
    assert "4 steps of at most 2 × 256 tokens · checkpoints every 2 steps and metrics.jsonl in " in said
    assert "step 0: validation loss 5." in said
    assert "train: 4/4 loss 5." in said
    assert not [word for word in QUIET if word in said]
