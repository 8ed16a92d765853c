"""DoRA, rsLoRA and IA3: they start as the base, are what their papers say, merge, and PEFT reads them."""

import json

import pytest
import torch
from delivering import deliver, loaded, perturbed, trained
from families import FAMILIES, IDS, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from controlllm import merging
from controlllm.config import IA3Config, LoRAConfig, ModelConfig
from controlllm.config.method import Method
from controlllm.errors import UserError
from controlllm.train.adapters import adapted_layers, add_adapters, merge_adapters
from controlllm.train.dora import adapted_lengths, row_lengths
from controlllm.train.weights import empty_model, fill

METHODS = {
    "dora": {"lora": {"rank": 4, "alpha": 6, "dora": True}},
    "rslora": {"lora": {"rank": 4, "alpha": 6, "rslora": True}},
    "both": {"lora": {"rank": 4, "alpha": 6, "dora": True, "rslora": True}},
    "ia3": {"ia3": {}},
}
FACTORS = {"dora": LoRAConfig(rank=3, alpha=5, dora=True), "ia3": IA3Config()}
TRANSPOSED = IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"])
# Names of other layers where a family has not Llama's.
LAYERS = {
    "Phi3": {"target_modules": ["qkv_proj", "down_proj"]},
    "Mixtral": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_start_as_the_base_and_merge_into_it(family, kind):
    model = tiny(family)
    want, kinds, names = model(IDS).logits, type(model), [name for name, _ in model.named_parameters()]
    adapter = FACTORS[kind].model_copy(update=LAYERS.get(family, {}) if kind == "ia3" else {})
    add_adapters(model, adapter, seed=0)
    assert torch.equal(model(IDS).logits, want)
    assert type(model) is kinds
    assert all(".ia3_l." in name or ".lora_" in name for name in trained(model))
    changed = perturbed(model)(IDS).logits
    assert (changed - want).abs().max() > 0.01
    merge_adapters(model)
    torch.testing.assert_close(model(IDS).logits, changed, atol=2e-5, rtol=1e-5)
    assert [name for name, _ in model.named_parameters()] == names


@torch.no_grad()
@pytest.mark.parametrize("adapter", [FACTORS["dora"], TRANSPOSED], ids=FACTORS)
def test_layers_that_are_stored_transposed_and_have_biases(adapter):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, n_positions=64)).eval()
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            bias.normal_()
    want = model(IDS).logits
    add_adapters(model, adapter, seed=0)
    assert torch.equal(model(IDS).logits, want)
    want = perturbed(model)(IDS).logits
    merge_adapters(model)
    torch.testing.assert_close(model(IDS).logits, want, atol=2e-5, rtol=1e-5)


@given(seed=st.integers(0, 2**16), rank=st.integers(1, 5), scaling=st.floats(0, 8), size=st.floats(0, 30))
def test_lengths_are_those_of_the_rows(seed, rank, scaling, size):
    torch.manual_seed(seed)
    weight, down, up = torch.randn(6, 9), torch.randn(rank, 9), size * torch.randn(6, rank)
    want = torch.linalg.vector_norm(weight.double() + scaling * up.double() @ down.double(), dim=1).float()
    found = adapted_lengths(weight, down, up, scaling)
    # Of a row that nearly vanishes only what is left of the parts' digits is known.
    parts = row_lengths(weight) + scaling * torch.linalg.vector_norm(up @ down, dim=1)
    assert ((found - want).abs() <= 1e-6 * parts.square() / want.clamp(min=1e-3) + 1e-5 * want).all()
    assert torch.equal(adapted_lengths(weight, down, 0 * up, scaling), row_lengths(weight))


@torch.no_grad()
def test_dora_is_a_length_times_a_direction(tiny_base):
    """m · (W + s·B·A) / ‖W + s·B·A‖ by rows, with s = alpha / rank or alpha / √rank."""
    for method, scaling in (("dora", 6 / 4), ("both", 6 / 2)):
        model = perturbed(loaded(tiny_base, **METHODS[method]))
        layer = adapted_layers(model)["model.layers.1.mlp.up_proj"]
        moved = layer.base_layer.weight + scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        lengths = layer.lora_magnitude_vector["default"].weight
        weight = lengths[:, None] * nn.functional.normalize(moved, dim=1)
        inputs = torch.randn(2, 5, 64)
        torch.testing.assert_close(layer(inputs), inputs @ weight.T, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_ia3_scales_outputs_or_inputs(tiny_base):
    model = perturbed(loaded(tiny_base, ia3={}))
    layers, inputs = adapted_layers(model), {"k_proj": torch.randn(2, 64), "down_proj": torch.randn(2, 96)}
    assert len(layers) == 12
    keys, down = (layers[f"model.layers.2.{name}"] for name in ("self_attn.k_proj", "mlp.down_proj"))
    assert keys.ia3_l["default"].shape == (32, 1)
    want = keys.ia3_l["default"].flatten() * (inputs["k_proj"] @ keys.base_layer.weight.T)
    torch.testing.assert_close(keys(inputs["k_proj"]), want)
    want = (down.ia3_l["default"].flatten() * inputs["down_proj"]) @ down.base_layer.weight.T
    torch.testing.assert_close(down(inputs["down_proj"]), want)


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_reaches_all_that_is_trained_and_nothing_else(tiny_base, method):
    model = perturbed(loaded(tiny_base, **METHODS[method]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, name


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_an_empty_model_is_filled_with_the_same(tiny_base, method, dtype):
    whole = loaded(tiny_base, dtype=dtype, seed=3, **METHODS[method]).eval()
    model = ModelConfig(name="base", dtype=dtype, attention="sdpa")
    empty = empty_model(tiny_base, model, Method.model_validate(METHODS[method]), seed=3).eval()
    fill(empty, tiny_base, device="cpu")
    for (name, one), (other_name, other) in zip(whole.named_parameters(), empty.named_parameters(), strict=True):
        assert name == other_name
        assert one.requires_grad == other.requires_grad
        assert one.dtype == other.dtype == (torch.float32 if one.requires_grad else getattr(torch, dtype))
        assert torch.equal(one, other), name
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        assert torch.equal(empty(IDS).logits, base(IDS).logits)


@pytest.mark.parametrize("section", ["target_modules", "feedforward_modules"])
def test_a_layer_that_does_not_exist_is_answered_with_those_that_do(tiny_base, section):
    ia3 = {"target_modules": ["k_proj", "kproj"], "feedforward_modules": ["kproj"] * (section != "target_modules")}
    says = (
        "ia3.target_modules: the blocks have no linear layer kproj; they have "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    with pytest.raises(UserError, match=says):
        loaded(tiny_base, ia3=ia3)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_delivered_as_a_plain_model_and_as_an_adapter(tiny_base, tmp_path, store, method, capsys):
    from peft import PeftModel

    folder, model = deliver(tiny_base, tmp_path, **METHODS[method])
    plain, want = AutoModelForCausalLM.from_pretrained(folder), model(IDS).logits
    assert not adapted_layers(plain)
    torch.testing.assert_close(plain(IDS).logits, want, atol=2e-5, rtol=1e-5)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder / "adapter")
    torch.testing.assert_close(again(IDS).logits, want, atol=2e-5, rtol=1e-5)
    cost = json.loads((folder / "config.json").read_text())["lineage"]["merge"]
    assert 0 < cost["largest_logit_difference"] <= 1e-4
    assert cost["tokens"] > 100
    said = f"adapters merged in float32: logits moved by at most {cost['largest_logit_difference']:.1e}"
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_merge_that_loses_more_than_digits_is_refused(tiny_base, tmp_path, store, monkeypatch):
    def wrong(model):
        merge_adapters(model)
        model.model.layers[0].mlp.up_proj.weight.data += 0.01

    monkeypatch.setattr(merging, "merge_adapters", wrong)
    with pytest.raises(UserError, match=r"merging the adapters moves a logit by .* more than float32 rounds") as error:
        deliver(tiny_base, tmp_path, **METHODS["ia3"])
    assert "\n" not in str(error.value)
