"""The method on a tiny model: it starts as the base, trains only the twins, caches and reloads exactly."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import controlllm  # noqa: F401 - makes the checkpoints known to transformers
from controlllm.config import ControlConfig
from controlllm.control.expand import control_blocks, freeze
from controlllm.control.loss import forward_with_loss
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings, choose_sites

IDS = torch.randint(0, 258, (2, 17), generator=torch.Generator().manual_seed(1))


def expanded(model, sites=(1, 3), **settings):
    return expand_model(model, ControlSettings(sites=list(sites), **settings))


def perturb(model):
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("sites", [(1, 3), (0,), (0, 1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_the_base_bitwise(tiny_model, sites, dtype):
    base = tiny_model.to(dtype)
    before = base(IDS).logits
    assert torch.equal(expanded(base, sites).eval()(IDS).logits, before)


def test_reloaded_is_saved(tiny_model, tmp_path):
    model = perturb(expanded(tiny_model))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__name__ == "ControlLlamaForCausalLM"
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    freeze(again)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.7}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "sampling", "static"],
)
def test_cached_is_uncached(tiny_model, arguments):
    model = perturb(expanded(tiny_model, (0, 1, 2, 3)))
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 12, "min_new_tokens": 12}
    plain = {k: v for k, v in arguments.items() if k != "cache_implementation"} | {
        "do_sample": "do_sample" in arguments
    }
    torch.manual_seed(3)
    uncached = model.generate(**prompt, **plain, use_cache=False)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**prompt, **plain | arguments), uncached)


def test_left_padding_changes_no_token(tiny_model):
    model = perturb(expanded(tiny_model))
    alone = model.generate(IDS[:1], attention_mask=torch.ones(1, 17), max_new_tokens=8, do_sample=False)
    padded = torch.cat([torch.ones(1, 5, dtype=torch.long), IDS[:1]], 1)
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, 17)], 1)
    together = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(together[:, 22:], alone[:, 17:])


def test_only_twins_and_gates_are_trained(tiny_model):
    model = expanded(tiny_model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(".expanded." in n or ".interpolation." in n for n, p in model.named_parameters() if p.requires_grad)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert any(
        not torch.equal(block.expanded.mlp.up_proj.weight, block.frozen.mlp.up_proj.weight)
        for block in control_blocks(model)
    )


def test_gate_can_be_fixed(tiny_model):
    model = expanded(tiny_model, train_alpha=False, alpha=0.25)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "interpolation" in n]
    assert torch.sigmoid(control_blocks(model)[0].interpolation.alpha_logit).item() == pytest.approx(0.25)


def test_loss_is_cross_entropy_plus_mean_squared_distance(tiny_model):
    model = perturb(expanded(tiny_model, divergence_weight=2.0)).train()
    seen = []
    for block in control_blocks(model):
        block.frozen.register_forward_hook(lambda _m, _i, out: seen.append(out))
        block.expanded.register_forward_hook(lambda _m, _i, out: seen.append(out))
    out = model(IDS, labels=IDS)
    distances = [(e - f).pow(2).mean() for f, e in zip(seen[0::2], seen[1::2], strict=True)]
    logits = model.lm_head(model.model(IDS).last_hidden_state)
    entropy = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert out.divergence.item() == pytest.approx(2 * torch.stack(distances).mean().item(), rel=1e-5)
    assert out.loss.item() == pytest.approx((entropy + out.divergence).item(), rel=1e-5)


def test_padding_counts_in_neither_loss(tiny_model):
    model = perturb(expanded(tiny_model)).train()
    alone = model(IDS, labels=IDS)
    padded = torch.cat([IDS, torch.ones(2, 6, dtype=torch.long)], 1)
    mask = torch.arange(23).expand(2, -1) < 17
    labels = padded.masked_fill(~mask, -100)
    out = model(padded, labels=labels, token_mask=mask)
    assert out.loss.item() == pytest.approx(alone.loss.item(), rel=1e-5)
    assert out.divergence.item() == pytest.approx(alone.divergence.item(), rel=1e-5)


def test_detached_teacher_is_a_constant(tiny_model):
    """Without targets only the divergence has a gradient; undetached, it reaches the lower twin through the teacher."""
    from copy import deepcopy

    def gradient(detach):
        model = perturb(expanded(deepcopy(tiny_model), detach_teacher=detach)).train()
        model(IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=1).loss.backward()
        return control_blocks(model)[1].expanded.mlp.up_proj.weight.grad, control_blocks(model)[
            0
        ].expanded.mlp.up_proj.weight.grad

    (top, lower), (top_too, lower_too) = gradient(True), gradient(False)
    assert torch.equal(top, top_too)
    assert not torch.equal(lower, lower_too)


def test_plain_model_has_the_same_loss(tiny_model):
    ours = forward_with_loss(tiny_model, IDS, labels=IDS)
    assert ours.divergence is None
    assert ours.loss.item() == pytest.approx(tiny_model(IDS, labels=IDS).loss.item(), rel=1e-5)


@pytest.mark.parametrize(("count", "sites", "chosen"), [
    (6, "evenly", [4, 9, 14, 19, 24, 29]), (30, "evenly", list(range(30))), (2, "top", [28, 29]), (2, [3, 7], [3, 7]),
])  # fmt: skip
def test_sites(count, sites, chosen):
    assert choose_sites(ControlConfig(num_expanded=count, sites=sites), 30) == chosen


@pytest.mark.parametrize(("count", "sites", "says"), [
    (7, "evenly", "7 does not divide the model's 30 layers"),
    (31, "top", "31 sites do not fit"),
    (1, [30], "layer 30 is out of range"),
])  # fmt: skip
def test_wrong_sites(count, sites, says):
    with pytest.raises(ValueError, match=says):
        choose_sites(ControlConfig(num_expanded=count, sites=sites), 30)
