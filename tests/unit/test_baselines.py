"""LoRA, partial and full fine-tuning: what is trained, and what is delivered of it."""

import json

import pytest
import torch
from delivering import deliver, loaded, perturbed, trained
from families import FAMILIES, IDS, tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from controlllm.config import LoRAConfig, PartialConfig
from controlllm.control.blocks import choose_blocks
from controlllm.errors import UserError
from controlllm.train.adapters import adapted_layers, add_adapters, merge_adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_start_as_the_base_and_merge_into_it(family):
    model = tiny(family)
    want, kind, names = model(IDS).logits, type(model), [name for name, _ in model.named_parameters()]
    add_adapters(model, LoRAConfig(rank=3, alpha=5), seed=0)
    assert torch.equal(model(IDS).logits, want)
    assert type(model) is kind
    assert all(".lora_A." in name or ".lora_B." in name for name in trained(model))
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} >= {"o_proj"}
    assert "lm_head" not in adapted_layers(model)
    want = perturbed(model)(IDS).logits
    merge_adapters(model)
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-5, rtol=1e-5)
    assert [name for name, _ in model.named_parameters()] == names


def test_layers_that_are_stored_transposed_merge_too():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, n_positions=64)).eval()
    add_adapters(model, LoRAConfig(rank=3), seed=0)
    assert len(adapted_layers(model)) == 8
    want = perturbed(model)(IDS).logits
    merge_adapters(model)
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-5, rtol=1e-5)


def test_adapters_depend_on_the_seed_only(tiny_base):
    torch.manual_seed(1)
    one = loaded(tiny_base, seed=4, lora={})
    torch.manual_seed(2)
    same, other = loaded(tiny_base, seed=4, dtype="bfloat16", lora={}), loaded(tiny_base, seed=5, lora={})
    for name in trained(one):
        assert torch.equal(one.get_parameter(name), same.get_parameter(name))
        assert torch.equal(one.get_parameter(name), other.get_parameter(name)) == ("lora_B" in name)
    (first, *rest) = [one.get_parameter(name) for name in sorted(trained(one)) if "q_proj.lora_A" in name]
    assert not any(torch.equal(first, layer) for layer in rest)
    assert first.abs().max() <= 64**-0.5  # kaiming uniform with a = √5


def test_named_layers_only(tiny_base):
    model = loaded(tiny_base, lora={"target_modules": ["q_proj", "mlp.up_proj"], "rank": 2, "alpha": 6})
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {"q_proj", "up_proj"}
    assert len(adapted_layers(model)) == 8
    assert {layer.scaling["default"] for layer in adapted_layers(model).values()} == {3.0}


@pytest.mark.parametrize("name", ["qproj", "lm_head", "proj"])
def test_a_layer_that_does_not_exist_is_answered_with_those_that_do(tiny_base, name):
    says = (
        f"lora.target_modules: the blocks have no linear layer {name}; they have "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    with pytest.raises(UserError, match=says):
        loaded(tiny_base, lora={"target_modules": ["q_proj", name]})


def test_partial_trains_the_chosen_blocks_alone(tiny_base):
    for blocks, chosen in [("top", {2, 3}), ("bottom", {0, 1}), ("evenly", {1, 3}), ([0, 3], {0, 3})]:
        model = loaded(tiny_base, dtype="bfloat16", partial={"num_blocks": 2, "blocks": blocks})
        names = {name for name, _ in model.named_parameters() if name.startswith("model.layers.")}
        assert trained(model) == {name for name in names if int(name.split(".")[2]) in chosen}
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if name in trained(model) else torch.bfloat16)


@pytest.mark.parametrize(("partial", "says"), [
    ({"num_blocks": 5}, "partial.num_blocks: 5 blocks are more than the model's 4 layers"),
    ({"num_blocks": 3, "blocks": "evenly"}, r"3 does not divide the model's 4 layers, .* use one of 1, 2, 4"),
    ({"num_blocks": 2, "blocks": [1, 4]}, r"partial.blocks: layer 4 is out of range; the model has layers 0\.\.3"),
])  # fmt: skip
def test_blocks_that_do_not_fit_are_refused_with_what_does(tiny_base, partial, says):
    with pytest.raises(ValueError, match=says):
        choose_blocks(PartialConfig.model_validate(partial), 4)
    with pytest.raises(UserError, match=says):
        loaded(tiny_base, partial=partial)


@pytest.mark.parametrize("method", ["lora", "partial", "full", "control"])
def test_a_gradient_reaches_all_that_is_trained_and_nothing_else(tiny_base, method):
    model = perturbed(loaded(tiny_base, **({} if method == "full" else {method: SMALL[method]})))
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, name


SMALL = {"lora": {"rank": 4}, "partial": {"num_blocks": 2}, "control": {"num_expanded": 2}}


@pytest.fixture
def delivered(tiny_base, tmp_path, store):
    """`delivered(**method)`: the consolidated folder, and the trained model that it was made of."""
    return lambda **method: deliver(tiny_base, tmp_path, **method)


@torch.no_grad()
def test_a_merged_adapter_is_a_plain_model_that_computes_the_same(delivered, tiny_base):
    folder, model = delivered(lora={"rank": 4, "alpha": 12, "dropout": 0.3})
    plain, want = AutoModelForCausalLM.from_pretrained(folder), model(IDS).logits
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert not adapted_layers(plain)
    torch.testing.assert_close(plain(IDS).logits, want, atol=1e-5, rtol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert (base(IDS).logits - want).abs().max() > 0.01
    assert load_file(folder / "model.safetensors").keys() == load_file(tiny_base / "model.safetensors").keys()
    assert json.loads((folder / "config.json").read_text())["lineage"]["base_model"] == tiny_base.name


@torch.no_grad()
def test_the_adapter_is_kept_as_peft_reads_it(delivered, tiny_base):
    from peft import PeftModel

    folder, model = delivered(lora={"rank": 4, "alpha": 12})
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder / "adapter")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-6)
    kept = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(kept) == len(trained(model))
    said = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (4, 12, tiny_base.name)
    assert str(tiny_base) not in (folder / "adapter" / "adapter_config.json").read_text()


@pytest.mark.parametrize("method", [{"partial": SMALL["partial"]}, {}])
def test_other_baselines_are_delivered_as_the_plain_model(delivered, tiny_base, method):
    folder, model = delivered(**method)
    plain, base = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(tiny_base)
    assert type(plain) is type(base)
    changed = set()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
        changed |= set() if torch.equal(parameter, base.get_parameter(name)) else {name}
    assert changed == trained(model)
    assert json.loads((folder / "config.json").read_text())["lineage"]["training"]["key"]
