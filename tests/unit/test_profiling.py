"""A profile of real steps: what is written, what is counted, and that compiled blocks survive it."""

import gzip
import json

import pytest
import torch
from conftest import tiny_config
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from controlllm.config import ControlConfig, ProfileConfig
from controlllm.control.expand import decoder_layers
from controlllm.control.loss import forward_with_loss
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError
from controlllm.train.attention import register
from controlllm.train.distributed import World
from controlllm.train.flops import step_cost
from controlllm.train.profiling import profile

LENGTHS = [30, 20]
IDS = torch.randint(3, 250, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
BATCH = {
    "input_ids": IDS,
    "labels": IDS,
    "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
    "cu_seq_lens_q": torch.tensor([0, 30, 50], dtype=torch.int32),
}
TARGETS = sum(LENGTHS) - 1


class Training:
    """A model and its steps."""

    def __init__(self, *, compiled=False, recomputed=False, **changes):
        register()
        torch.manual_seed(0)
        base = LlamaForCausalLM(tiny_config(attn_implementation="packed", use_cache=False))
        control = ControlConfig(num_expanded=2, **changes)
        self.model = expand_model(base, ControlSettings.resolve(control, num_layers=4)).train()
        self.cost = step_cost(self.model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        self.compiled_frames = 0
        for layer in decoder_layers(self.model.base_model):
            if compiled:
                layer.compile(backend=self.backend)
            if recomputed:
                forward = layer.forward
                layer.forward = lambda *args, run=forward, **kw: checkpoint(run, *args, use_reentrant=False, **kw)

    def backend(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.compiled_frames += 1
        return aot_eager(graph, inputs)

    def steps(self, count, config, folder):
        with profile(config, folder, World()) as step:
            for _ in range(count):
                loss = forward_with_loss(self.model, **BATCH).loss
                assert loss is not None
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                step(self.cost.step(LENGTHS, targets=TARGETS))
        return folder / "profile"


def trace_of(folder):
    with gzip.open(folder / "trace-rank0.json.gz", "rt") as stream:
        return json.load(stream)["traceEvents"]


def steps_in(folder):
    return len([event for event in trace_of(folder) if event.get("name", "").startswith("ProfilerStep#")])


def test_a_trace_has_the_active_steps_and_a_table(tmp_path, capsys):
    config = ProfileConfig(wait=1, warmup=1, active=2, stacks=True, memory=True)
    folder = Training().steps(6, config, tmp_path)
    assert sorted(file.name for file in folder.iterdir()) == ["operations-rank0.txt", "trace-rank0.json.gz"]
    assert steps_in(folder) == 2
    table = (folder / "operations-rank0.txt").read_text()
    assert "aten::mm" in table
    assert "Self CPU Mem" in table
    assert any("test_profiling.py" in event.get("name", "") for event in trace_of(folder))  # stacks
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("  profile: trace-rank0.json.gz, operations-rank0.txt in ")
    assert "perfetto" in told


@pytest.mark.parametrize("changes", [{}, {"recomputed": True, "interpolation": "slerp", "divergence": "cosine"}])
def test_flops_are_counted_by_module_beside_compiled_blocks(tmp_path, changes):
    training = Training(compiled="recomputed" not in changes, **changes)
    folder = training.steps(4, ProfileConfig(wait=0, warmup=1, active=2, flops=True), tmp_path)
    assert steps_in(folder) == 2
    if "recomputed" not in changes:
        assert training.compiled_frames > 0
        assert any("CompiledFunction" in event.get("name", "") for event in trace_of(folder))
    text = (folder / "flops.txt").read_text()
    counted = float(text.split(" counted")[0].rpartition(" ")[2])
    useful = training.cost.step(LENGTHS, targets=TARGETS)
    assert f"{useful:.4e}" in text
    if "recomputed" in changes:
        assert counted > 1.2 * useful
    else:
        assert counted == pytest.approx(useful, rel=0.1)  # attention is little here, and no more than that apart
    modules = {line.split()[0] for line in text.splitlines()[2:]}
    assert any(name.endswith("layers.*.expanded.mlp") for name in modules)
    assert any(name.endswith("layers.*.frozen.self_attn") for name in modules)


@pytest.mark.parametrize(("count", "said"), [(1, "there is no trace"), (4, "the trace has 1 of 2 steps")])
def test_a_run_shorter_than_the_schedule_says_so(tmp_path, capsys, count, said):
    folder = Training().steps(count, ProfileConfig(wait=1, warmup=2, active=2), tmp_path)
    told = capsys.readouterr().err.splitlines()[0]
    assert said in told
    assert "wait 1, warmup 2, active 2" in told
    assert (folder / "trace-rank0.json.gz").exists() == (count == 4)


def test_without_a_config_and_on_other_processes_nothing_is_done(tmp_path):
    for config, world in [(None, World()), (ProfileConfig(wait=0), World(rank=1, size=2))]:
        with profile(config, tmp_path, world) as step:
            step(1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_does_not_exist_is_refused(tmp_path):
    with (
        pytest.raises(UserError, match=r"train\.profile\.rank 2 is not one of the 2 processes"),
        profile(ProfileConfig(rank=2), tmp_path, World(size=2)),
    ):
        pass
