"""What a run computes and keeps its numbers in, the loss scale, and float8 as torchao emulates it."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from controlllm.config import ControlConfig, TrainConfig
from controlllm.control.expand import control_blocks
from controlllm.control.model import expand_model, number_of_layers
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError
from controlllm.train import loss_scale
from controlllm.train.loss_scale import LossScale
from controlllm.train.optim import make_optimizer
from controlllm.train.precision import autocast, cast_model, shard_dtypes, to_float8, trained_dtype

CPU = torch.device("cpu")
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def config(precision, **changes):
    return TrainConfig.model_validate({"precision": precision} | changes)


def expanded(model):
    return expand_model(
        model, ControlSettings.resolve(ControlConfig(num_expanded=2), num_layers=number_of_layers(model))
    )


@pytest.mark.parametrize(
    ("precision", "computed", "trained", "gathered"),
    [
        ("float32", fp32, fp32, (None, None)),
        ("bf16", bf16, fp32, (bf16, fp32)),
        ("fp16", fp16, fp32, (fp16, fp32)),
        ("float8", bf16, fp32, (bf16, fp32)),
        ("bf16_stochastic", bf16, bf16, (bf16, fp32)),
        ("bf16_kahan", bf16, bf16, (bf16, fp32)),
    ],
)
def test_what_a_precision_means(tiny_model, precision, computed, trained, gathered):
    chosen, model = config(precision), expanded(tiny_model)
    cast_model(model, chosen)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {trained} == {trained_dtype(chosen)}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {trained}
    assert {b.dtype for b in model.buffers()} == {fp32}
    assert shard_dtypes(chosen) == gathered
    block = control_blocks(model)[0]
    with autocast(chosen, CPU):
        assert block.expanded.mlp.up_proj(torch.ones(1, 64, dtype=trained)).dtype == computed


def test_frozen_weights_in_half_stay_where_what_is_trained_is_wide(tiny_model):
    model = expanded(tiny_model.bfloat16())
    cast_model(model, config("bf16"))
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(True, fp32), (False, bf16)}


@pytest.mark.parametrize("precision", ["bf16", "bf16_stochastic", "bf16_kahan", "fp16"])
def test_every_precision_learns(tiny_model, precision):
    chosen, model = config(precision, lr=5e-3), expanded(tiny_model).train()
    cast_model(model, chosen)
    optimizer, scale = make_optimizer(model, chosen), LossScale(chosen)
    ids = torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        with autocast(chosen, CPU):
            loss = model(ids, labels=ids, use_cache=False).loss
        scale.scale(loss).backward()
        scale.unscale(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_the_scale_saves_gradients_that_fp16_cannot_hold():
    def gradient(precision):
        torch.manual_seed(0)
        model, scale = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), LossScale(config(precision))
        with autocast(config("fp16"), CPU):
            loss = 1e-8 * model(torch.ones(1, 8)).float().sum()
        scale.scale(loss).backward()
        scale.unscale(model.parameters())
        return model[0].weight.grad

    assert not gradient("float32").any()  # no scale
    found = gradient("fp16")
    assert found.any()
    torch.manual_seed(0)
    exact = 1e-8 * (nn.Linear(8, 8), nn.Linear(8, 1))[1].weight.detach().T.expand(8, 8)
    torch.testing.assert_close(found, exact, rtol=0.01, atol=0)


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 60))
def test_the_scale_follows_its_rule_and_survives_a_restart(finite, stop):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "GROWTH_STEPS", 4)
        scale, value, good = LossScale(config("fp16")), 2.0**16, 0
        for number, ok in enumerate(finite):
            if number == stop:
                state, scale = scale.state(), LossScale(config("fp16"))
                scale.load(state)
            assert scale.update(ok) == (not ok and value > 1)
            good = good + 1 if ok else 0
            value = value if ok else max(1.0, value / 2)
            if good == 4:
                value, good = min(value * 2, 2.0**24), 0
            assert scale.state() == {"value": value, "finite_steps": good}


def test_without_fp16_no_overflow_is_explained():
    scale, loss = LossScale(config("bf16")), torch.tensor(3.0)
    assert scale.scale(loss) is loss
    assert not scale.update(False)
    assert scale.state()["value"] == 1


@pytest.fixture
def torchao():
    pytest.importorskip("torchao")


@pytest.mark.usefixtures("torchao")
def test_float8_changes_products_of_the_blocks_and_nothing_else(tiny_model):
    model = expanded(tiny_model).train()
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 90, bias=False)  # no multiple of 16
    model.model.layers[0].mlp.gate_proj = nn.Linear(64, 90, bias=False)
    model.model.layers[0].mlp.down_proj = nn.Linear(90, 64, bias=False)
    ids = torch.randint(2, 258, (1, 21), generator=torch.Generator().manual_seed(0))  # nor are the tokens
    before = dict(model.named_parameters())
    exact = model(ids, labels=ids, use_cache=False)
    exact.loss.backward()
    grads = {name: p.grad.clone() for name, p in before.items() if p.grad is not None}
    model.zero_grad()
    to_float8(model, config("float8"), CPU, emulate=True)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    changed = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears - changed == {"lm_head"} | {f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate", "down")}
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    assert not torch.equal(out.logits, exact.logits)
    assert (out.logits - exact.logits).norm() < 0.1 * exact.logits.norm()
    found = {name: p.grad for name, p in after.items() if p.grad is not None}
    assert found.keys() == grads.keys()
    name = "model.layers.3.expanded.mlp.down_proj.weight"
    assert (found[name] - grads[name]).norm() < 0.2 * grads[name].norm()


@pytest.mark.usefixtures("torchao")
def test_float8_with_nothing_to_do_is_said():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            from transformers import LlamaConfig, LlamaForCausalLM

            sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 2}
            made = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=16))
            self.base_model = made.base_model

    with pytest.raises(UserError, match="no linear layer of the blocks has sizes that are multiples of 16"):
        to_float8(Tiny(), config("float8"), CPU, emulate=True)


def test_a_device_without_float8_is_refused(tiny_model, monkeypatch):
    with pytest.raises(UserError, match=r"train.precision float8 needs a GPU of .* 8.9 .*found a CPU; use bf16"):
        to_float8(tiny_model, config("float8"), CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100")
    with pytest.raises(UserError, match=r"found NVIDIA A100 \(8\.0\); use bf16"):
        to_float8(tiny_model, config("float8"), torch.device("cuda", 0))
    to_float8(tiny_model, config("bf16"), CPU)


def test_float8_without_its_package_is_said(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"float8: torchao is not installed; pip install 'controlllm\[quant\]'"):
        to_float8(tiny_model, config("float8"), CPU, emulate=True)
