"""torch's older FSDP trains what one process trains, and shares checkpoints with every other way of sharing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from killed_runs import WATCHED, Kill, inputs_of, killed_and_gone_on, lines, pack, train, trained
from ranks import run
from tiny_training import METHODS, make
from transformers import LlamaForCausalLM

from controlllm.config import load_config
from controlllm.errors import UserError
from controlllm.train.distributed import World
from controlllm.train.trained import whole_trained_tensors

pytestmark = pytest.mark.distributed

STEPS = 20
FSDP1 = {"trainer": "transformers", "parallel": {"kind": "fsdp", "version": 1}}
LOSSES = ("loss", "cross_entropy", "divergence")
COMMON = {"steps": STEPS, "lr": 2e-3, "optimizer": {"weight_decay": 0.1}, "checkpoint": {"every": 10}}
RAMP = {"kind": "linear", "final": 0.9, "steps": 6}
METHODS["moved"] = {"control": {"num_expanded": 2, "train_alpha": False, "alpha_schedule": RAMP}}


def rows_of(world, base, folder, method, **changes):
    """What a run writes down, step by step."""
    make(world, Path(base), Path(folder), METHODS[method], **COMMON | changes).train()
    found = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if "loss" in row]


def way(**parallel):
    return {**FSDP1, "parallel": FSDP1["parallel"] | parallel}


CASES = {
    "control-1": ("control", way()),
    "control-4": ("control", way() | {"micro_batch_size": 4}),
    "lora-1": ("lora", way()),
    "full-1": ("full", way()),
    "moved-1": ("moved", way(reshard_after_forward=False)),
    "control-offload": ("control", way(cpu_offload=True)),
    "control-replicate": ("control", way(frozen="replicate")),
    "lora-replicate": ("lora", way(frozen="replicate", reshard_after_forward=False)),
}


ALONE = {"trainer": "native"}
FSDP2 = {"trainer": "native", "parallel": {"kind": "fsdp"}}
# Folders, and which ways go on in them one after the other, after two steps each.
JOURNEYS = {
    "whole": [(4, way())],
    "resumed": [(2, way()), (4, way())],
    "to ddp": [(2, way(frozen="replicate")), (4, ALONE)],
    "to fsdp2": [(2, way()), (4, FSDP2)],
    "from fsdp2": [(2, FSDP2), (4, way(reshard_after_forward=False))],
    "from one": [(4, way())],
    "to one": [(2, way())],
}


def go(world, base, folder, stops):
    """The trained tensors at the end of a run that stops and goes on."""
    for steps, changes in stops:
        settings = COMMON | {"schedule": {"kind": "constant"}, "steps": steps} | changes
        trainer = make(world, Path(base), Path(folder), METHODS["moved"], **settings)
        trainer.train()
    return {name: t.numpy() for name, t in whole_trained_tensors(trainer.parallel.model, keep=True).items()}


def everything(world, base, folder):
    folder = Path(folder)
    found = {name: rows_of(world, base, folder / name, method, **changes) for name, (method, changes) in CASES.items()}
    return found, {name: go(world, base, folder / name, stops) for name, stops in JOURNEYS.items()}


@pytest.fixture(scope="module")
def native(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    methods = {method for method, _ in CASES.values()}
    return {method: rows_of(World(), tiny_base, folder / method, method) for method in methods}


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    go(World(), tiny_base, folder / "from one", [(2, ALONE)])
    return folder


@pytest.fixture(scope="module")
def ranks(tiny_base, folder):
    return run(everything, 2, str(tiny_base), str(folder))


@pytest.mark.parametrize("case", CASES)
def test_as_one_process(native, ranks, case):
    for found, _ in ranks:
        for row, expected in zip(found[case], native[CASES[case][0]], strict=True):
            losses = [[one.get(key) or 0.0 for key in LOSSES] for one in (row, expected)]
            assert losses[0] == pytest.approx(losses[1], abs=1e-5, rel=0)
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
            assert row.get("alpha") == pytest.approx(expected.get("alpha"), abs=1e-5)


def test_goes_on_anywhere(tiny_base, folder, ranks):
    for _, found in ranks:
        whole = found["whole"]
        for name, tensor in whole.items():
            assert np.array_equal(found["resumed"][name], tensor)
        found["to one"] = go(World(), tiny_base, folder / "to one", [(4, ALONE)])
        for journey, other in found.items():
            assert other.keys() == whole.keys()
            for name, tensor in whole.items():
                np.testing.assert_allclose(other[name], tensor, atol=1e-6, rtol=0, err_msg=f"{journey}: {name}")


def hybrid(world, base, folder):
    return rows_of(world, base, folder, "full", steps=4, **way(replicas=2))


def test_replicas_of_two(tiny_base, tmp_path):
    alone = rows_of(World(), tiny_base, tmp_path / "one", "full", steps=4)
    for rows in run(hybrid, 4, str(tiny_base), str(tmp_path / "four")):
        for row, expected in zip(rows, alone, strict=True):
            assert [row["loss"], row["grad_norm"]] == pytest.approx([expected["loss"], expected["grad_norm"]], abs=1e-5)


REFUSED = {
    "version 1 .* precision": ["train.precision=bf16_kahan"],
    "version 1 .* optimizer.name": ["train.optimizer.name=adamw_8bit"],
    "control.twin lora .*version 1": ["control.twin=lora", "lora={}"],
    "lora.dora .*version 1": ["control=null", "lora={dora: true}", "model.dtype=bfloat16", "train.precision=bf16"],
    "prompt .*version 1": ["control=null", "prompt={}", "model.dtype=bfloat16", "train.precision=bf16"],
}


@pytest.mark.parametrize("said", REFUSED)
def test_refused(recipe, said):
    with pytest.raises(UserError, match=said):
        load_config(recipe, "train.trainer=transformers", "train.parallel={kind: fsdp, version: 1}", *REFUSED[said])


@pytest.fixture
def shards(tmp_path, monkeypatch, tokenizer):
    """Of a base whose head is a matrix of its own."""
    monkeypatch.setenv("CONTROLLLM_CACHE", str(tmp_path / "store"))
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return pack(tmp_path / "base")


def test_the_whole_stage(tmp_path, shards):
    watched = WATCHED | {"generate": {"items": 3, "max_new_tokens": 4}}
    base = tmp_path / "base"
    train(inputs_of(base, shards, watched=watched, micro_batch_size=2), tmp_path / "one")
    inputs = inputs_of(base, shards, watched=watched, **way())
    train(inputs, tmp_path / "two", size=2)
    killed_and_gone_on(inputs, tmp_path / "killed", tmp_path / "two", [Kill("backward", 6, call=2)], size=2)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    for found, expected in zip(two, one, strict=True):
        assert flat(found) == pytest.approx(flat(expected), rel=1e-4, abs=1e-4)
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert one.keys() == two.keys()
    summaries = [json.loads((tmp_path / name / "train.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["total_parameters"] == summaries[1]["total_parameters"]
    assert summaries[0]["trained_parameters"] == summaries[1]["trained_parameters"]


def flat(row):
    return {k: v for k, v in row.items() if not isinstance(v, dict)} | row.get("alpha", {})
