"""Twins that share the frozen block's weights: what is theirs, what is trained, what is delivered."""

import json

import pytest
import torch
from delivering import deliver, loaded, perturbed, trained
from families import IDS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import controlllm
from controlllm.config import Method, ModelConfig
from controlllm.config.run import validate
from controlllm.control.expand import control_blocks
from controlllm.control.fold import fold_model
from controlllm.control.loss import base_only, forward_with_loss
from controlllm.errors import UserError
from controlllm.recipe import Source
from controlllm.train.trained import trained_tensors
from controlllm.train.twins import own_weights, shares_weights
from controlllm.train.weights import empty_model, fill

ADAPTERS = {
    "lora": {"rank": 4}, "dora": {"rank": 3, "dora": True}, "rslora": {"rank": 4, "rslora": True}, "ia3": {},
}  # fmt: skip


def method(kind, **control):
    section = "ia3" if kind == "ia3" else "lora"
    return {"control": {"num_expanded": 2, "twin": section} | control, section: ADAPTERS[kind]}


@torch.no_grad()
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_twin_is_its_block_and_adapters(tiny_base, kind):
    base = AutoModelForCausalLM.from_pretrained(tiny_base, attn_implementation="sdpa")
    model = loaded(tiny_base, **method(kind)).eval()
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert forward_with_loss(model, IDS, labels=IDS).divergence == 0
    own = {name for name, _ in model.named_parameters() if ".expanded." in name or ".interpolation." in name}
    assert own == trained(model) == trained_tensors(model).keys()
    assert all(".lora_" in name or ".ia3_l." in name or "alpha_logit" in name for name in own)
    alone = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in own)
    assert alone == sum(parameter.numel() for parameter in base.parameters())
    for block in control_blocks(model):
        assert shares_weights(block)
        frozen = {parameter.data_ptr() for parameter in block.frozen.parameters()}
        assert frozen <= {parameter.data_ptr() for parameter in block.expanded.parameters()}
    full = loaded(tiny_base, control={"num_expanded": 2})
    assert not any(map(shares_weights, control_blocks(full)))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_only_adapters_and_weights_of_the_blend_learn(tiny_base, kind):
    model = perturbed(loaded(tiny_base, **method(kind, norm_relaxation="learned")))
    out = forward_with_loss(model, IDS, labels=IDS)
    assert out.divergence > 0
    out.loss.backward()
    for name, parameter in model.named_parameters():
        # A relaxation below 0 is clamped.
        moves = parameter.requires_grad and not (name.endswith("relaxation_logit") and parameter < 0)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == moves, name
    assert sum("relaxation_logit" in name for name in trained(model)) == 4
    still = loaded(tiny_base, **method(kind, norm_relaxation="learned", train_alpha=False))
    assert trained(still) == {name for name in trained(model) if "lora_" in name or "ia3_l" in name}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_cached_generation_and_the_base_within(tiny_base, kind):
    model = perturbed(loaded(tiny_base, **method(kind)))
    model.config.use_cache = True
    want = model(IDS, use_cache=False).logits
    half = model(IDS[:, :9], use_cache=True)
    rest = model(IDS[:, 9:], past_key_values=half.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([half.logits, rest.logits], 1), want, atol=1e-5, rtol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, attn_implementation="sdpa")
    with base_only(model):
        assert torch.equal(model(IDS, use_cache=False).logits, base(IDS).logits)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_empty_model_is_filled_with_the_same(tiny_base, kind):
    whole, model = loaded(tiny_base, seed=3, **method(kind)), ModelConfig(name="base", attention="sdpa")
    empty = empty_model(tiny_base, model, Method.model_validate(method(kind)), seed=3)
    fill(empty, tiny_base, device="cpu")
    for (name, one), (other_name, other) in zip(whole.named_parameters(), empty.named_parameters(), strict=True):
        assert (name, one.requires_grad) == (other_name, other.requires_grad)
        assert torch.equal(one, other), name
    assert all(map(shares_weights, control_blocks(empty)))


@torch.no_grad()
def test_weights_of_its_own_change_nothing(tiny_base):
    model = perturbed(loaded(tiny_base, **method("dora")))
    want = model(IDS).logits
    own_weights(model)
    assert not any(map(shares_weights, control_blocks(model)))
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-6, rtol=1e-6)  # products round by where they lie


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dora", "ia3"])
@pytest.mark.parametrize("interpolation", ["lerp", "none"])
def test_delivered_as_an_ordinary_expanded_model(tiny_base, tmp_path, store, kind, interpolation):
    given = method(kind, interpolation=interpolation)
    folder, model = deliver(tiny_base, tmp_path, **given)
    again, want = AutoModelForCausalLM.from_pretrained(folder), model(IDS).logits
    torch.testing.assert_close(again(IDS).logits, want, atol=2e-5, rtol=1e-5)
    like = loaded(tiny_base, control=given["control"] | {"twin": "full"})
    assert load_file(folder / "model.safetensors").keys() == {name for name, _ in like.named_parameters()}
    said = json.loads((folder / "config.json").read_text())
    assert said["model_type"] == "controlllm"
    assert "twin" not in said["control"]
    assert said["lineage"]["merge"]["largest_logit_difference"] <= 1e-4
    assert not (folder / "adapter").exists()
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    dialled = controlllm.load(folder, alpha_scale=0.0)
    torch.testing.assert_close(dialled(IDS).logits, base(IDS).logits, atol=0, rtol=0)
    folded = fold_model(again, {1: 1.0, 3: 1.0} if interpolation == "none" else {1: 0.5, 3: 0.5})
    assert type(folded) is type(base)
    if interpolation == "none":  # exact where all of the twin is taken
        torch.testing.assert_close(folded(IDS).logits, want, atol=1e-5, rtol=1e-5)
    else:
        assert (folded(IDS).logits - want).abs().max() < (base(IDS).logits - want).abs().max()


@pytest.mark.parametrize(("sections", "says"), [
    ({"control": {"twin": "lora"}}, "control.twin lora needs a lora section"),
    ({"control": {"twin": "lora", "layout": "stack"}, "lora": {}}, "use layout concat or twin full"),
    ({"control": {"twin": "lora"}, "lora": {}, "prompt": {}}, "control and prompt exclude each other"),
    ({"control": {}, "lora": {}}, r"control and lora exclude each other: .* \(or set control.twin to it\)"),
])  # fmt: skip
def test_what_cannot_go_together_is_said_in_one_line(sections, says):
    run = {"name": "run", "model": {"name": "model"}, "mix": {"datasets": [{"name": "puzzles"}]}} | sections
    with pytest.raises(UserError, match=says) as error:
        validate(run, Source())
    assert "\n" not in str(error.value)
