"""What training the twins changes and what it leaves alone."""

from copy import deepcopy

import pytest
import torch
from families import IDS, perturb, tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from controlllm.control.block import attention_of
from controlllm.control.expand import control_blocks, freeze
from controlllm.control.interpolation import STRATEGIES
from controlllm.control.loss import base_only
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


def expanded(base, sites=(1, 3), **settings):
    return expand_model(deepcopy(base), ControlSettings(sites=list(sites), **settings))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model, **arguments):
    model.zero_grad()
    model(IDS, labels=IDS, **arguments).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("interpolation", STRATEGIES)
@pytest.mark.parametrize("layout", ["concat", "stack", "hybrid"])
def test_trained_tensors_are_the_planned_ones(layout, interpolation):
    model = perturb(expanded(tiny("Llama"), layout=layout, interpolation=interpolation)).train()
    stacked = {"concat": (), "stack": (2, 5), "hybrid": (2,)}[layout]
    paired = {"concat": (1, 3), "stack": (), "hybrid": (4,)}[layout]
    unused = ("router",) if interpolation == "moe_hard" else ()
    planned = {
        name
        for name, _ in model.named_parameters()
        if any(f".{i}." in name for i in stacked)
        or (
            any(f".{i}.{part}." in name for i in paired for part in ("expanded", "interpolation"))
            and not any(part in name for part in unused)
        )
    }
    assert trained(model) == planned == set(gradients(model))


@pytest.mark.parametrize(("settings", "still"), [
    ({"train_alpha": False}, {"alpha_logit"}),
    ({"train_alpha": False, "interpolation": "dlerp"}, {"gate_bias"}),
    ({"train_alpha": False, "interpolation": "moe", "norm_relaxation": "learned"}, {"router_bias", "relaxation_logit"}),
    ({"interpolation": "proj", "divergence": "none"}, {"map_delta"}),
    ({"interpolation": "moe_hard", "divergence_alpha": "gate"}, set()),
])  # fmt: skip
def test_what_stays_still_inside_a_pair(settings, still):
    model = perturb(expanded(tiny("Llama"), **settings)).train()
    inside = {name for name, _ in model.named_parameters() if ".expanded." in name or ".interpolation." in name}
    assert {name.rpartition(".")[2] for name in inside - trained(model)} == still
    assert set(gradients(model)) == trained(model)


@pytest.mark.parametrize(("dtype", "layout"), [
    (torch.float32, "concat"),
    (torch.bfloat16, "hybrid"),
    pytest.param(torch.float32, "hybrid", marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, "concat", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_thousand_steps_leave_every_frozen_tensor_alone(dtype, layout):
    model = expanded(
        tiny("Llama", tie_word_embeddings=True, num_hidden_layers=2, **SMALL).to(dtype), (0, 1), layout=layout
    )
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    moved = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(1000):
        model.train()(IDS[:, :6], labels=IDS[:, :6]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    assert not any(torch.equal(now[name], tensor) for name, tensor in moved.items())


@pytest.mark.parametrize(("layout", "interpolation", "divergence"), [
    ("concat", "lerp", "mse"), ("hybrid", "dlerp", "cosine"), ("stack", "lerp", "none"), ("concat", "prog", "dot"),
    ("concat", "lerp", "attention"),
])  # fmt: skip
def test_gradient_checkpointing_changes_no_gradient(layout, interpolation, divergence):
    model = perturb(
        expanded(tiny("Llama", "eager"), layout=layout, interpolation=interpolation, divergence=divergence)
    ).train()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def outputs(model, ids=IDS):
    """(frozen, expanded) of every pair, by hooks."""
    seen = []
    for block in control_blocks(model):
        block.frozen.register_forward_hook(lambda _m, _i, out: seen.append(out))
        block.expanded.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model.plain_forward(ids)
    return list(zip(seen[0::2], seen[1::2], strict=True))


def test_the_gate_weighs_each_token():
    model = perturb(expanded(tiny("Llama"), interpolation="dlerp", divergence_alpha="gate", divergence_weight=3.0))
    got = model(IDS, labels=IDS).divergence
    want = []
    for block, (frozen, twin) in zip(control_blocks(model), outputs(model), strict=True):
        w = block.interpolation(frozen, twin, None)[1].squeeze(-1)
        want.append((w * (frozen - twin).square().mean(-1)).mean())
    assert got.item() == pytest.approx(3 * torch.stack(want).mean().item(), rel=1e-5)


def test_trajectory_is_the_base_models_own():
    base = tiny("Llama")
    trajectory = base(IDS, output_hidden_states=True).hidden_states
    for layout, pairs in [("concat", {1: 1, 3: 3}), ("hybrid", {3: 4})]:
        model = perturb(expanded(base, layout=layout, teacher="trajectory", detach_teacher=True))
        with base_only(model):
            assert torch.equal(model.plain_forward(IDS).logits, base(IDS).logits)
        got = model(IDS, labels=IDS).divergence
        twins = [twin for _, twin in outputs(model)]
        last = base.model.layers[3](
            trajectory[3], position_embeddings=base.model.rotary_emb(IDS, torch.arange(17)[None])
        )
        states = [trajectory[site + 1] if site < 3 else last for site in pairs]
        want = torch.stack([(twin - state).square().mean() for twin, state in zip(twins, states, strict=True)]).mean()
        assert got.item() == pytest.approx(want.item(), rel=1e-4)


def test_attention_divergence_compares_the_maps():
    model = perturb(expanded(tiny("Llama", attention="eager"), divergence="attention"))
    maps = []
    for block in control_blocks(model):
        for part in (block.frozen, block.expanded):
            attention_of(part).register_forward_hook(lambda _m, _i, out: maps.append(out[1]))
    got = model(IDS, labels=IDS).divergence
    kl = [
        (e * ((e + 1e-8).log() - (f + 1e-8).log())).sum(-1).mean() for f, e in zip(maps[0::2], maps[1::2], strict=True)
    ]
    assert got.item() == pytest.approx(torch.stack(kl).mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="attention eager"):
        expanded(tiny("Llama"), divergence="attention")(IDS, labels=IDS)


def test_padding_by_attention_mask_counts_in_neither_loss():
    model = perturb(expanded(tiny("Llama"), interpolation="dlerp", divergence="cosine"))
    alone = model(IDS, labels=IDS)
    padded = torch.cat([IDS, torch.zeros(2, 6, dtype=torch.long)], 1)
    mask = (padded > 0).long()
    out = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    assert out.loss.item() == pytest.approx(alone.loss.item(), rel=1e-5)
    assert out.divergence.item() == pytest.approx(alone.divergence.item(), rel=1e-5)


@given(
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1)]),  # MHA, GQA, MQA
    layers=st.integers(1, 4),
    head_dim=st.sampled_from([2, 6]),
    qwen=st.booleans(),  # biases
    tied=st.booleans(),
    layout=st.sampled_from(["concat", "stack", "hybrid"]),
    interpolation=st.sampled_from(sorted(STRATEGIES)),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_any_size_starts_as_its_base_and_caches(heads, layers, head_dim, qwen, tied, layout, interpolation, data):
    sites = sorted(data.draw(st.sets(st.integers(0, layers - 1), min_size=1)))
    if layout == "hybrid" and len(sites) % 2:
        sites = sites[1:]
    assume(sites)
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    sizes |= {
        "hidden_size": heads[0] * head_dim,
        "intermediate_size": 10,
        "vocab_size": 99,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config((Qwen2Config if qwen else LlamaConfig)(**sizes, pad_token_id=0)).eval()
    want = base(IDS).logits
    model = expanded(base, sites, layout=layout, interpolation=interpolation)
    assert torch.equal(model.eval()(IDS).logits, want)
    perturb(model)
    arguments = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **arguments), model.generate(IDS, **arguments, use_cache=False))
    freeze(model)
    assert trained(model) == trained(expanded(base, sites, layout=layout, interpolation=interpolation))
