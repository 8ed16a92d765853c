"""Of several processes: one file, the slowest's figures, and the weights of a sharded model."""

import json
import math

import pytest
import torch
from conftest import tiny_config
from ranks import run
from transformers import LlamaForCausalLM

from controlllm.config import FSDP, ControlConfig, MetricsConfig, ProfileConfig, TrainConfig
from controlllm.control.expand import control_blocks
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.train.curves import RunFacts
from controlllm.train.flops import step_cost
from controlllm.train.metrics import Metrics, StepRecord
from controlllm.train.parallel import parallelize
from controlllm.train.profiling import profile

pytestmark = pytest.mark.distributed
IDS = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(0))


def sharded_run(world, folder, compiled):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(use_cache=False))
    model = expand_model(model, ControlSettings.resolve(ControlConfig(num_expanded=2), num_layers=4)).train()
    control_blocks(model)[1].interpolation.get_parameter("alpha_logit").data.fill_(math.log(3))
    cost = step_cost(model)
    parallel = parallelize(model, world, TrainConfig(precision="float32", parallel=FSDP(), compile=compiled))
    metrics = Metrics(folder, MetricsConfig(every=2), world=world, run=RunFacts("a", "a", {}), model=model)
    with profile(ProfileConfig(rank=1, wait=0, warmup=0, active=1, flops=True), folder, world) as step:
        for number in range(1, 4):
            loss = parallel(input_ids=IDS, labels=IDS).loss
            loss.backward()
            step(cost.step([40], targets=39))
            waited = 0.25 * (1 + world.rank)
            metrics.step(StepRecord(number, 1e-3, 2.0, 1.5, 0.5, 1.0, 80, 78, seconds=1.0, data_seconds=waited))
    metrics.close()
    return cost.step([40], targets=39, causal=False)


@pytest.mark.parametrize("compiled", ["none", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_two_processes_write_one_file(tmp_path, compiled):
    useful, _ = run(sharded_run, 2, tmp_path, compiled)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    assert [row["data_seconds"] for row in rows] == [1.0, 0.5]  # of process 1, who waited longer
    assert [row["alpha"] for row in rows] == [{"1": pytest.approx(0.5), "3": pytest.approx(0.75)}] * 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "profile"]
    assert sorted(file.name for file in (tmp_path / "profile").iterdir()) == [
        "flops.txt", "operations-rank1.txt", "trace-rank1.json.gz",
    ]  # fmt: skip
    counted = float((tmp_path / "profile" / "flops.txt").read_text().split(" counted")[0].rpartition(" ")[2])
    assert counted == pytest.approx(useful, rel=0.05)
