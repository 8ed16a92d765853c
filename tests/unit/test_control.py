"""The loss of an expanded model, its gate, and where its sites are."""

import pytest
import torch
from families import perturb

import controlllm  # noqa: F401 - makes the checkpoints known to transformers
from controlllm.config import ControlConfig
from controlllm.control.expand import control_blocks
from controlllm.control.loss import forward_with_loss
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings, choose_sites

IDS = torch.randint(0, 258, (2, 17), generator=torch.Generator().manual_seed(1))


def expanded(model, sites=(1, 3), **settings):
    return expand_model(model, ControlSettings(sites=list(sites), **settings))


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
    (4, "every_nth_of_top", [23, 25, 27, 29]), (15, "every_nth_of_top", list(range(1, 30, 2))),
])  # fmt: skip
def test_sites(count, sites, chosen):
    assert choose_sites(ControlConfig(num_expanded=count, sites=sites), 30) == chosen


@pytest.mark.parametrize(("count", "sites", "says"), [
    (7, "evenly", "7 does not divide the model's 30 layers"),
    (31, "top", "31 sites do not fit"),
    (1, [30], "layer 30 is out of range"),
    (16, "every_nth_of_top", "need 31 layers, the model has 30; use at most 1"),
])  # fmt: skip
def test_wrong_sites(count, sites, says):
    with pytest.raises(ValueError, match=says):
        choose_sites(ControlConfig(num_expanded=count, sites=sites), 30)
