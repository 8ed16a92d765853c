"""Quantised frozen weights: the matrices, what is trained beside them, what is delivered, and what is refused."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from delivering import deliver, loaded, perturbed
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from controlllm.config import QuantizationConfig, RunConfig, TrainConfig
from controlllm.control.loss import forward_with_loss
from controlllm.errors import UserError
from controlllm.model_shape import Shape
from controlllm.quantizable import PACKAGES, unquantizable
from controlllm.quantized_memory import bytes_saved
from controlllm.train.activations import checkpoint_activations
from controlllm.train.compiling import compile_blocks
from controlllm.train.optim import make_optimizer
from controlllm.train.precision import autocast, cast_model, to_float8
from controlllm.train.quantize import FrozenLinear, dequantise, dequantise_, quantise, weight_count

KINDS = {
    "nf4": {"kind": "nf4"},
    "nf4 single": {"kind": "nf4", "double_quant": False},
    "int8": {"kind": "int8"},
    "int8_torchao": {"kind": "int8_torchao"},
    "float8": {"kind": "float8"},
}
METHODS = {
    "control": {"control": {"num_expanded": 2, "interpolation": "dlerp"}},
    "hybrid": {"control": {"layout": "hybrid", "num_expanded": 2}},
    "twin of adapters": {"control": {"num_expanded": 2, "twin": "lora"}, "lora": {"rank": 4}},
    "lora": {"lora": {"rank": 4}},
    "dora": {"lora": {"rank": 4, "dora": True}},
    "ia3": {"ia3": {}},
    "prompt": {"prompt": {"num_virtual_tokens": 3}},
}
LENGTH = 40
IDS = torch.randint(2, 258, (1, LENGTH), generator=torch.Generator().manual_seed(0))
BATCH = {
    "input_ids": IDS,
    "labels": IDS,
    "position_ids": torch.arange(LENGTH)[None],
    "cu_seq_lens_q": torch.tensor([0, LENGTH], dtype=torch.int32),
}
# The levels of NormalFloat (Dettmers et al. 2023, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def quantised(base, method, kind, **options):
    return loaded(base, attention="packed", quantization=KINDS[kind], **METHODS[method], **options)


def step(model):
    """The loss, and the gradients of what is trained."""
    model.zero_grad()
    loss = forward_with_loss(model, **BATCH).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other):
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    assert one[1].keys() == other[1].keys() != set()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], atol=1e-5, rtol=1e-5, msg=name)


def plain(model):
    """Changed in place."""
    dequantise_(model)
    assert not any(isinstance(module, FrozenLinear) for module in model.modules())
    return model


@given(st.integers(1, 9), st.integers(2, 80), st.integers(0, 10**6), st.sampled_from(["nf4 single", "int8_torchao"]))
@settings(max_examples=40, deadline=None)
def test_every_weight_becomes_the_nearest_level(rows, columns, seed, name):
    kind = QuantizationConfig.model_validate(KINDS[name])
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = dequantise(quantise(weight, kind), kind, shape=(rows, columns), dtype=torch.float32)
    if name == "nf4 single":
        flat = weight.flatten()
        scale = torch.cat([block.abs().max().expand(len(block)) for block in flat.split(64)]).reshape(rows, columns)
        levels = NF4 * scale[..., None]
    else:
        levels = torch.arange(-128, 128) * (weight.abs().amax(dim=1, keepdim=True) / 127.5)[..., None]
    nearest = (levels - weight[..., None]).abs().amin(dim=-1)
    torch.testing.assert_close((found - weight).abs(), nearest, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.1), ("nf4 single", 0.1), ("int8", 0.01), ("int8_torchao", 0.01),
                                             ("float8", 0.03)])  # fmt: skip
def test_the_error_is_that_of_the_bits(kind, error):
    config = QuantizationConfig.model_validate(KINDS[kind])
    weight = torch.randn(96, 130, generator=torch.Generator().manual_seed(0))
    parts = quantise(weight, config)
    assert {part.dtype for part in parts.values()} == {torch.uint8}
    found = dequantise(parts, config, shape=(96, 130), dtype=torch.float32)
    assert error / 2 < (found - weight).norm() / weight.norm() < error
    assert torch.equal(dequantise(parts, config, shape=(96, 130), dtype=torch.bfloat16), found.bfloat16())


# Every method with one kind of each library, every kind with two methods.
GRID = [(m, k) for m in METHODS for k in KINDS if k in ("nf4", "int8") or m in ("control", "lora")]


@pytest.mark.parametrize(("method", "kind"), GRID)
def test_it_computes_and_learns_as_plain_weights_of_the_same_values(tiny_base, method, kind):
    model = quantised(tiny_base, method, kind)
    frozen = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    assert len(frozen) == 28 + 14 * (method == "twin of adapters")
    assert not any(p.requires_grad for layer in frozen for p in layer.parameters())
    before = step(model)
    if method != "prompt":
        base = plain(quantised(tiny_base, "lora", kind))
        assert before[0] == pytest.approx(step(base)[0], abs=1e-5)  # starts as the quantised base
    after, count = step(perturbed(model).train()), weight_count(model)
    assert_same(after, step(plain(model)))
    assert weight_count(model) == count == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("method", ["control", "lora", "dora", "ia3"])
def test_the_loss_falls(tiny_base, method):
    model = quantised(tiny_base, method, "nf4")
    config = TrainConfig(lr=3e-3)
    cast_model(model, config)
    optimizer = make_optimizer(model, config)
    losses = []
    for _ in range(8):
        with autocast(config, torch.device("cpu")):
            loss = forward_with_loss(model, **BATCH).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.003


@pytest.mark.parametrize("way", ["selective", "full", pytest.param("compiled", marks=pytest.mark.slow)])
def test_ways_of_computing_it_agree(tiny_base, way):
    model = perturbed(quantised(tiny_base, "control", "nf4")).train()
    want = step(model)
    if way == "compiled":
        compile_blocks(model, "aot_eager")
    else:
        checkpoint_activations(model, way)
    assert_same(step(model), want)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16_kahan", "float8"])
def test_precisions_leave_the_stored_bytes_alone(tiny_base, precision):
    model, config = quantised(tiny_base, "control", "float8"), TrainConfig(precision=precision)
    before = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    same = plain(copy.deepcopy(model))
    losses = []
    for one in (model, same):
        cast_model(one, config)
        to_float8(one, config, torch.device("cpu"), emulate=True)
        with autocast(config, torch.device("cpu")):
            losses.append(forward_with_loss(one, **BATCH).loss)
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=2e-2)
    assert before.keys() == {name for name, p in model.named_parameters() if p.dtype == torch.uint8} != set()
    for name, bytes_ in before.items():
        assert torch.equal(model.get_parameter(name), bytes_), name


@torch.no_grad()
@pytest.mark.parametrize("method", ["control", "lora", "ia3", "twin of adapters"])
def test_what_is_delivered_is_what_was_trained_and_needs_no_quantiser(tiny_base, tmp_path, store, method):
    folder, model = deliver(tiny_base, tmp_path, quantization=KINDS["nf4"], **METHODS[method])
    want = model(IDS).logits
    close = 1e-5 if method == "control" else 1e-4  # what merging in float32 may cost
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, want, atol=close, rtol=1e-5)
    assert json.loads((folder / "config.json").read_text())["lineage"]["quantization"]["kind"] == "nf4"
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
    if method == "control":
        base = AutoModelForCausalLM.from_pretrained(tiny_base)(IDS).logits
        assert (base - want).abs().max() > 0.01
        np.save(tmp_path / "ids.npy", IDS.numpy())
        np.save(tmp_path / "want.npy", want.numpy())
        subprocess.run([sys.executable, "-c", BARE, folder, tmp_path], check=True, capture_output=True)


BARE = """
import sys
sys.modules |= {"bitsandbytes": None, "torchao": None}
import numpy as np, torch, controlllm
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    found = model(torch.from_numpy(np.load(sys.argv[2] + "/ids.npy"))).logits
np.testing.assert_allclose(found, np.load(sys.argv[2] + "/want.npy"), atol=1e-5, rtol=1e-5)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_that_are_predicted(tmp_path, kind):
    from transformers import LlamaConfig, LlamaForCausalLM

    from controlllm.model_shape import Decoder

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=258, **sizes)).save_pretrained(tmp_path)
    model = loaded(tmp_path, quantization=KINDS[kind], lora={"rank": 2})
    parts = [p for m in model.modules() if isinstance(m, FrozenLinear) for p in m.parts.values()]
    decoder = Decoder(256, 512, 4, 2, 64, 258, tied=False)
    config = QuantizationConfig.model_validate(KINDS[kind])
    predicted = 4 * decoder.block_matrices - bytes_saved(config, decoder, stored=4)
    assert sum(p.numel() for p in parts) == pytest.approx(predicted, rel=0.01)


def run(kind="nf4", **train):
    return RunConfig.model_validate(
        {
            "name": "run",
            "model": {"name": "model"},
            "mix": {"datasets": [{"name": "puzzles"}]},
            "lora": {},
            "quantization": {"kind": kind},
            "train": train,
        }
    )


REFUSED = {
    "train.parallel.frozen: shard .* quantization .* replicate": {"parallel": {"kind": "fsdp"}},
    "train.parallel.version: 1 .* quantization .* version: 2": {
        "trainer": "transformers", "parallel": {"kind": "fsdp", "version": 1, "frozen": "replicate"},
    },
    "train.parallel.zero_stage: 3 .* quantization .* zero_stage 2": {
        "trainer": "transformers", "parallel": {"kind": "deepspeed"},
    },
}  # fmt: skip


@pytest.mark.parametrize("says", REFUSED)
def test_what_cannot_be_shared_is_refused_with_both_settings(says):
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(unquantizable(run(**REFUSED[says]), None))
    assert unquantizable(run(parallel={"kind": "fsdp", "frozen": "replicate"}), None) is None


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_missing_package_is_named(monkeypatch, kind):
    assert unquantizable(run(kind), None) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = unquantizable(run(kind), None)
    assert said == (
        f"quantization.kind: {kind} is by {PACKAGES[kind]}, which is not installed; pip install 'controlllm[quant]'"
    )


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_blocks_that_would_stay_as_large_are_refused_before_and_while_loading(tmp_path, family):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, n_positions=64))
    else:
        model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=2, vocab_size=99, num_local_experts=4, **sizes))
    model.save_pretrained(tmp_path)
    said = unquantizable(run(), Shape(2, 64, tmp_path, 0))
    assert said is not None
    assert said.startswith("quantization: stores linear layers in fewer bits, and most weights")
    with pytest.raises(UserError, match="quantization stores linear layers in fewer bits, but only"):
        loaded(tmp_path, quantization={}, lora={"target_modules": ["c_attn" if family == "gpt2" else "q_proj"]})
