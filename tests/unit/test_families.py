"""Every layout and interpolation on every family: the start is the base, a cache changes nothing, saving neither."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from families import FAMILIES, IDS, perturb, tiny
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig, LlamaForCausalLM

import controlllm  # noqa: F401 - makes the checkpoints known to transformers
from controlllm.control.expand import decoder_layers, freeze
from controlllm.control.interpolation import STRATEGIES
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.data.loader import collate
from controlllm.train.attention import register

LAYOUTS = ("concat", "stack", "hybrid")
KINDS = [("concat", "lerp"), ("hybrid", "dlerp"), ("stack", "lerp"), ("concat", "moe")]
WAYS = {"greedy": {}, "sampling": {"do_sample": True}, "beams": {"num_beams": 3}}


def expanded(base, sites=(0, 1, 2, 3), **settings):
    return expand_model(deepcopy(base), ControlSettings(sites=list(sites), **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_start_is_the_base_bitwise(family, dtype):
    base = tiny(family).to(dtype)
    want = base(IDS, output_hidden_states=True)
    for layout in LAYOUTS:
        for interpolation in STRATEGIES:
            for sites in [(1, 3), (0, 1, 2, 3)]:
                model = expanded(base, sites, layout=layout, interpolation=interpolation, norm_relaxation="learned")
                got = model.eval()(IDS, output_hidden_states=True)
                assert torch.equal(got.logits, want.logits), (layout, interpolation)
                assert len(got.hidden_states) == model.config.num_hidden_layers + 1
                assert torch.equal(got.hidden_states[-1], want.hidden_states[-1])


@pytest.mark.parametrize(("layout", "interpolation"), KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_changes_no_token(family, layout, interpolation):
    model = perturb(expanded(tiny(family), layout=layout, interpolation=interpolation))
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), IDS], 1)
    padded[1, :7] = 0
    for way, arguments in WAYS.items():
        for ids in (IDS, padded):
            uncached = generate(model, ids, use_cache=False, **arguments)
            assert torch.equal(generate(model, ids, **arguments), uncached), way
            assert torch.equal(generate(model, ids, cache_implementation="static", **arguments), uncached), way


def generate(model, ids, **arguments):
    torch.manual_seed(3)
    lengths = {"max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0}
    return model.generate(ids, attention_mask=(ids > 0).long(), **{"do_sample": False} | arguments | lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_no_logit(family):
    model = perturb(expanded(tiny(family), layout="hybrid"))
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), IDS], 1)
    mask = (padded > 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(got, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@torch.no_grad()
def test_attention_kernels_agree(attention):
    model = perturb(expanded(tiny("Llama", num_attention_heads=2), layout="hybrid", interpolation="slerp"))
    want = model(IDS).logits
    model.set_attn_implementation(attention)
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-5, rtol=1e-5)
    cached = generate(model, IDS)
    assert torch.equal(cached, generate(model, IDS, use_cache=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_reloaded_is_saved(family, layout, tmp_path):
    model = perturb(expanded(tiny(family), layout=layout, interpolation="dlerp", norm_relaxation="learned"))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__name__.startswith("Control") == (layout != "stack")
    got, want = again(IDS, output_hidden_states=True), model(IDS, output_hidden_states=True)
    assert torch.equal(got.logits, want.logits)
    assert all(map(torch.equal, got.hidden_states, want.hidden_states))
    assert torch.equal(generate(again, IDS), generate(model, IDS))
    freeze(again)
    assert trained(again) == trained(model)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_do_not_see_each_other(family, attention):
    """Longer and shorter than the sliding windows."""
    register()
    without_caps = {"attn_logit_softcapping": None} if family == "Gemma2" else {}
    model = perturb(expanded(tiny(family, attention, **without_caps), layout="hybrid"))
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 99, size) for size in (17, 5, 30, 16)]

    def run(*some):
        row = {"input_ids": np.concatenate(some), "lengths": np.array([len(d) for d in some])}
        batch = collate([row | {"target": np.ones(len(row["input_ids"]), bool)}]).arguments()
        del batch["labels"]
        return model(**batch, use_cache=False).logits

    alone = torch.cat([run(document) for document in documents], 1)
    torch.testing.assert_close(run(*documents), alone, atol=1e-5, rtol=1e-5)
    model.set_attn_implementation("sdpa")
    whole = [model(torch.tensor(document)[None]).logits for document in documents]
    torch.testing.assert_close(alone, torch.cat(whole, 1), atol=1e-5, rtol=1e-5)


def test_packed_attention_refuses_what_it_cannot_do():
    register()
    with pytest.raises(ValueError, match="no softcap, which this model needs"):
        tiny("Gemma2", "packed")(IDS[:1], cu_seq_lens_q=torch.tensor([0, 17]))


def test_experts_are_copied_too():
    model = expanded(tiny("Mixtral"), sites=[1])
    experts = model.model.layers[1].expanded.mlp.experts
    assert all(parameter.requires_grad for parameter in experts.parameters())
    assert not any(parameter.requires_grad for parameter in model.model.layers[1].frozen.parameters())


def test_a_decoder_without_blocks_says_what_was_looked_for():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = LlamaConfig(num_hidden_layers=2)
            self.parts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    with pytest.raises(ValueError, match=r"looked for one ModuleList of 2 blocks.*parts with 2 × Linear"):
        decoder_layers(Decoder())


@pytest.mark.parametrize(("settings", "says"), [
    ({"sites": [4]}, r"ascending layers of 0\.\.3"), ({"sites": []}, "ascending layers"),
    ({"sites": [1], "layout": "hybrid"}, "even number"),
])  # fmt: skip
def test_sites_that_do_not_fit_change_nothing(settings, says):
    base = tiny("Llama")
    with pytest.raises(ValueError, match=says):
        expand_model(base, ControlSettings(**settings))
    assert type(base).__name__ == "LlamaForCausalLM"


def test_twins_have_no_twins():
    model = expand_model(tiny("Llama"), ControlSettings(sites=[1]))
    with pytest.raises(ValueError, match="has twins already; fold it first"):
        expand_model(model, ControlSettings(sites=[1]))


def test_a_model_that_also_sees_is_refused_in_a_line():
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=tiny("Gemma3Text").config.to_dict(), vision_config=sight | {"image_size": 28})
    with pytest.raises(ValueError, match="also sees or hears is not expanded"):
        expand_model(AutoModelForCausalLM.from_config(config), ControlSettings(sites=[1]))


def test_a_stacked_model_can_be_the_base_of_another_run(tmp_path):
    perturb(expanded(tiny("Llama"), [1], layout="stack")).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    want = base(IDS).logits
    model = expanded(base, [2, 4])
    assert torch.equal(model.eval()(IDS).logits, want)
    assert not any("layers.2.frozen" in name for name in trained(model))


def test_an_unknown_output_projection_says_what_was_looked_for():
    model = LlamaForCausalLM(tiny("Llama").config)
    for layer in model.model.layers:
        layer.mlp.last = layer.mlp.__dict__["_modules"].pop("down_proj")
        layer.self_attn.last = layer.self_attn.__dict__["_modules"].pop("o_proj")
    with pytest.raises(ValueError, match=r"looked for the output projections.*o_proj, down_proj"):
        expand_model(model, ControlSettings(sites=[1], layout="stack"))
    assert len(model.model.layers) == 4
