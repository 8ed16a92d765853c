"""The predicted memory: known cases by hand, every setting in the right direction, a few true measurements."""

import gc
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from controlllm import memory as module
from controlllm.config import Method, RunConfig
from controlllm.control.loss import forward_with_loss
from controlllm.errors import UserError
from controlllm.memory import Machine, changes, check_memory, predict
from controlllm.model_shape import Decoder, Shape
from controlllm.step_memory import CONTEXT, Step
from controlllm.train import attention
from controlllm.train.activations import checkpoint_activations
from controlllm.train.model import prepare, storage_dtype

LLAMA_8B = Shape(32, 131072, Path("llama"), 0, Decoder(4096, 14336, 32, 8, 128, 128256, tied=False))
SMALL = Shape(4, 2048, Path("small"), 0, Decoder(128, 352, 4, 2, 32, 128, tied=False))
GB = 10**9


TWINS = {"num_expanded": 2}
SECTIONS = {
    "control": {"control": TWINS}, "partial": {"partial": {"num_blocks": 2}}, "full": {},
    "lora": {"lora": {"rank": 8}}, "dora": {"lora": {"rank": 8, "dora": True}}, "ia3": {"ia3": {}},
    "twins with lora": {"control": TWINS | {"twin": "lora"}, "lora": {"rank": 8}},
    "twins with dora": {"control": TWINS | {"twin": "lora"}, "lora": {"rank": 8, "dora": True}},
    "twins with ia3": {"control": TWINS | {"twin": "ia3"}, "ia3": {}},
}  # fmt: skip


def run(method="control", *, dtype=None, context=8192, attention="packed", **train) -> RunConfig:
    narrowest = "float32" if train.get("precision") == "float32" else "bfloat16"
    return RunConfig.model_validate(
        {
            "name": "run",
            "model": {"name": "model", "dtype": dtype or narrowest, "attention": attention},
            "mix": {"datasets": [{"name": "puzzles"}]},
            "pack": {"context_length": context},
            "train": {"global_batch_size": 8} | train,
            **SECTIONS[method],
        }
    )


def total(config, shape=LLAMA_8B, **options) -> int:
    return predict(shape, config, **options).device.total


@pytest.mark.parametrize(("expanded", "billion"), [(None, 128.5), (4, 30.0), (8, 44.0), (16, 71.9)])
def test_weights_gradients_and_adam_of_llama_8b(expanded, billion):
    """By hand: 2 bytes of a frozen bfloat16 weight, 4 + 4 + 8 of a trained one, its gradient and its two moments."""
    config = run("full")
    if expanded:
        config = run().model_copy(update={"control": run().control.model_copy(update={"num_expanded": expanded})})
    *_, at_step = Step(LLAMA_8B, config, processes=1, device="cuda").moments()
    assert at_step.moment == "optimizer step"
    assert (at_step.total - CONTEXT["cuda"]) / GB == pytest.approx(billion, abs=0.05)


def test_sizes_of_llama_8b():
    decoder = LLAMA_8B.decoder
    assert decoder.block == 218_112_000
    assert 32 * decoder.block + decoder.outer == 8_030_261_248
    block = predict(LLAMA_8B, run(), processes=1).device.bytes
    trained = 2 * 218_112_000 + 2  # two twins and their weights
    assert block["trained weights"] == pytest.approx(4 * trained, rel=1e-6)
    assert block["optimizer state"] == pytest.approx(8 * trained, rel=1e-6)
    assert block["frozen weights"] == 2 * 8_030_261_248


LESS = {
    "smaller micro-batch": ({"micro_batch_size": 2}, {"micro_batch_size": 1}),
    # Fused kernels keep so little that selective saves nothing beside them.
    "selective": ({"kernels": "torch"}, {"kernels": "torch", "activation_checkpointing": "selective"}),
    "full": ({"activation_checkpointing": "selective"}, {"activation_checkpointing": "full"}),
    "8 bits": ({}, {"optimizer": {"name": "adamw_8bit"}}),
    "pure bfloat16": ({}, {"precision": "bf16_kahan"}),
    "without compensation": ({"precision": "bf16_kahan"}, {"precision": "bf16_stochastic"}),
    "products in bfloat16": ({"precision": "float32"}, {"precision": "bf16", "dtype": "float32"}),
    "sharded": ({}, {"parallel": {"kind": "fsdp"}}),
    "frozen sharded": ({"parallel": {"kind": "fsdp", "frozen": "replicate"}}, {"parallel": {"kind": "fsdp"}}),
    "resharded": ({"parallel": {"kind": "fsdp", "reshard_after_forward": False}}, {"parallel": {"kind": "fsdp"}}),
    "more shards": ({"parallel": {"kind": "fsdp", "replicas": 4}}, {"parallel": {"kind": "fsdp", "replicas": 2}}),
    "offloaded": ({"parallel": {"kind": "fsdp"}}, {"parallel": {"kind": "fsdp", "cpu_offload": True}}),
    "ZeRO-1": ({}, {"trainer": "transformers", "parallel": {"kind": "deepspeed", "zero_stage": 1}}),
    "ZeRO-3": (
        {"trainer": "transformers", "parallel": {"kind": "deepspeed", "zero_stage": 1}},
        {"trainer": "transformers", "parallel": {"kind": "deepspeed", "zero_stage": 3}},
    ),
    "optimizer offloaded": (
        {"trainer": "transformers", "parallel": {"kind": "deepspeed", "zero_stage": 2}},
        {"trainer": "transformers", "parallel": {"kind": "deepspeed", "zero_stage": 2, "cpu_offload": True}},
    ),
    "fused kernels": ({"kernels": "torch"}, {"kernels": "liger"}),
}


@pytest.mark.parametrize("method", ["control", "partial", "lora", "full"])
@pytest.mark.parametrize("change", LESS)
def test_a_setting_that_saves_memory_saves_memory(change, method):
    more, less = LESS[change]
    if method == "full" and change == "frozen sharded":
        more, less = less | {"micro_batch_size": 2}, less  # nothing is frozen
    assert total(run(method, **less), processes=8) < total(run(method, **more), processes=8)


@given(
    method=st.sampled_from(sorted(SECTIONS)),
    mode=st.sampled_from(["none", "selective", "full"]),
    precision=st.sampled_from(["bf16", "float32", "fp16", "bf16_kahan"]),
    parallel=st.sampled_from([{"kind": "ddp"}, {"kind": "fsdp"}, {"kind": "fsdp", "frozen": "replicate"}]),
    processes=st.sampled_from([1, 2, 8]),
    context=st.integers(16, 4096),
)
def test_sums_and_growth(method, mode, precision, parallel, processes, context):
    assume(precision != "bf16_kahan" or not ("dora" in method or "ia3" in method))  # which config refuses
    settings = {"activation_checkpointing": mode, "precision": precision, "parallel": parallel}
    config = run(method, context=context, **settings)
    found = predict(SMALL, config, processes=processes)
    for parts in (found.device, found.host):
        assert parts.total == sum(parts.bytes.values())
        assert all(size > 0 for size in parts.bytes.values())
    assert found.device.total == max(
        parts.total for parts in Step(SMALL, config, processes=processes, device="cuda").moments()
    )
    longer = run(method, context=context + 64, **settings)
    # Not more where the optimizer's moment is the peak: there no activations are left.
    assert total(longer, SMALL, processes=processes) >= found.device.total
    if parallel["kind"] == "fsdp" and processes > 1:
        assert found.device.bytes["trained weights"] < total(config, SMALL, processes=1)


def test_more_twins_and_lower_ones_need_more():
    def with_sites(*sites):
        control = run().control.model_copy(update={"num_expanded": len(sites), "sites": list(sites)})
        return total(run().model_copy(update={"control": control}))

    assert with_sites(30, 31) < with_sites(15, 31) < with_sites(7, 15, 23, 31)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("numbers", [("float32", "float32"), ("bfloat16", "bf16")], ids=str)
@pytest.mark.parametrize("method", SECTIONS)
def test_what_a_forward_pass_keeps(method, numbers, mode):
    """Measured: every tensor that autograd keeps of a small model, without its weights and without the loss."""
    (dtype, precision), tokens = numbers, 256
    config = run(method, dtype=dtype, context=tokens, precision=precision, activation_checkpointing=mode,
                 global_batch_size=1)  # fmt: skip
    step = Step(SMALL, config, processes=1, device="cpu")
    kept = next(parts.bytes for parts in step.moments() if parts.moment == "start of the backward pass")
    expected = sum(kept.get(name, 0) for name in ("activations", "blends", "weight copies"))
    numbers_left = SMALL.decoder.hidden + 2 * SMALL.decoder.head_dim  # the loss's gradient; cosines and sines
    expected += tokens * step.numbers.residual * numbers_left
    assert measured(config, tokens) == pytest.approx(expected, rel=0.08)


def small_model(config):
    d = SMALL.decoder
    sizes = LlamaConfig(
        hidden_size=d.hidden, intermediate_size=d.intermediate, num_hidden_layers=SMALL.layers, vocab_size=d.vocabulary,
        num_attention_heads=d.heads, num_key_value_heads=d.kv_heads, attn_implementation="packed",
    )  # fmt: skip
    attention.register()
    return prepare(LlamaForCausalLM(sizes).to(storage_dtype(config.model, config.method)), config.method, seed=0)


@pytest.mark.parametrize("method", SECTIONS)
def test_numbers_are_those_of_the_model(method):
    config = run(method)
    step, model = Step(SMALL, config, processes=1, device="cpu"), small_model(config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    alphas = sum(parameter.numel() for name, parameter in model.named_parameters() if "interpolation" in name)
    assert step.trained == trained - alphas
    assert step.trained + step.frozen == sum(parameter.numel() for parameter in model.parameters()) - alphas


def measured(config, tokens) -> int:
    d, method, model = SMALL.decoder, config.method, small_model(config)
    checkpoint_activations(model, config.train.activation_checkpointing)
    ids = torch.randint(0, d.vocabulary, (1, tokens))
    batch = {"position_ids": torch.arange(tokens)[None], "cu_seq_lens_q": torch.tensor([0, tokens], dtype=torch.int32)}
    bf16 = config.train.precision == "bf16"
    with live_bytes() as allocated, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = forward_with_loss(model, ids, labels=ids, **batch).loss
    head = 4 * d.embedding if method == Method() else 0  # its gradient is there already
    assert loss is not None
    return allocated[0] - head


@contextmanager
def live_bytes():
    """Bytes that were allocated inside and not released, by the allocator's own account."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    sums: list[int] = []
    gc.collect()  # what earlier models leave would be released, and counted, inside
    with torch.profiler.profile(activities=activities, profile_memory=True) as record:
        yield sums
    events = record.profiler.kineto_results.events()
    sums.append(sum(event.nbytes() for event in events if event.name() == "[memory]"))


def test_changes_are_predictions_of_their_own():
    config = run(micro_batch_size=2)
    found = {change.overrides: change.memory.device.total for change in changes(LLAMA_8B, config, processes=8)}
    assert found[("train.micro_batch_size=1",)] == total(run(micro_batch_size=1), processes=8)
    sharded = found[("train.parallel.kind=fsdp", "--processes 8")]
    assert sharded == total(run(micro_batch_size=2, parallel={"kind": "fsdp"}), processes=8)
    assert list(found.values()) == sorted(found.values())
    assert not any("selective" in " ".join(names) for names in _names(run(activation_checkpointing="full")))


def _names(config):
    return [change.overrides for change in changes(LLAMA_8B, config, processes=8)]


def test_check_says_what_to_change_first(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(module, "this_machine", lambda: Machine("cuda", 8, 80 * GB))
    check_memory(run(), LLAMA_8B)
    check_memory(run("full", parallel={"kind": "fsdp"}), LLAMA_8B)
    with pytest.raises(
        UserError, match=r"training needs 1\d\d\.\d GB per process and its GPU has 80.0; set train\."
    ) as e:
        check_memory(run("full"), LLAMA_8B)
    assert "\n" not in str(e.value)
    monkeypatch.setattr(module, "this_machine", lambda: Machine("cpu", 1, None))
    check_memory(run("full"), LLAMA_8B)


def test_unknown_blocks_are_not_guessed():
    unknown = Shape(32, 1024, Path("experts"), 0)
    check_memory(run(), unknown)
    with pytest.raises(UserError, match="experts: memory is predicted for dense decoders"):
        predict(unknown, run())


def test_shards_must_fit_the_processes():
    with pytest.raises(UserError, match="3 replicas × 2 shards need 6 processes, but there are 8"):
        predict(LLAMA_8B, run(parallel={"kind": "fsdp", "replicas": 3}), processes=8)


COMMAND = """
import sys, typer
from controlllm.cli_train import add_commands
app = typer.Typer(); add_commands(app); app.command("other")(lambda: None)
app(sys.argv[1:], standalone_mode=False)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def memory_command(*arguments) -> str:
    command = [sys.executable, "-c", COMMAND, "memory", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_command_prints_parts_and_verdict_without_torch(recipe):
    out = memory_command(recipe, "--processes", 2, "--per-node", 2, "--device-memory", 24)
    for line in ("device: ", "host: ", "host of 2 processes: ", "optimizer state", "train.parallel.kind=fsdp"):
        assert line in out
    assert out.splitlines()[-1].startswith("fits: 0.7")
    assert memory_command(recipe, "--device-memory", 0.5).splitlines()[-1].startswith("does not fit: 0.7")


def test_command_gives_json(recipe):
    found = json.loads(memory_command(recipe, "train.precision=bf16", "--device-memory", 24, "--json"))
    assert found["fits"] is True
    assert found["kind"] == "cuda"
    assert found["available"] == 24 * GB
    for side in ("device", "host"):
        assert found[side]["total"] == sum(found[side]["parts"].values())
    assert all(change["set"] for change in found["changes"])
