"""The lean autograd step gives what the plain formulas give; each interpolation and divergence is its formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from controlllm.config import INTERPOLATIONS
from controlllm.control.blend import _plain, blended
from controlllm.control.divergence import DIVERGENCES, attention_divergence
from controlllm.control.interpolation import STRATEGIES, MixtureOfTwo, Slerp

HIDDEN = 6
MEASURES = [name for name in DIVERGENCES if name != "attention"]


def test_a_recipe_can_name_what_is_registered():
    assert tuple(STRATEGIES) == INTERPOLATIONS


def states(seed=0, distance=0.5):
    generator = torch.Generator().manual_seed(seed)
    frozen, other, inputs = (torch.randn(2, 5, HIDDEN, generator=generator) for _ in range(3))
    return frozen, frozen + distance * other, inputs


def trained(name, alpha=0.5):
    torch.manual_seed(1)
    interpolation = STRATEGIES[name](HIDDEN, alpha=alpha)
    for parameter in interpolation.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return interpolation


def outcome(function, name, measure, detach, gate):
    """Everything that a pair gives and every gradient, for a loss that uses all of it."""
    interpolation = trained(name)
    leaves = [tensor.clone().requires_grad_() for tensor in states()]
    out = function(interpolation, measure, leaves)
    loss = (out.hidden * torch.arange(HIDDEN)).sum()
    if out.distance is not None:
        loss = loss + (out.distance * (out.weights.gate.squeeze(-1) if gate else 1)).sum()
    loss.backward()
    return [loss, *[t.grad for t in (*leaves, *interpolation.parameters()) if t.grad is not None]]


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_gradients_are_those_of_the_plain_formulas(name, measure, detach, gate):
    measure = DIVERGENCES[measure]
    lean = outcome(lambda i, m, t: blended(i, m, *t, detach_teacher=detach), name, measure, detach, gate)
    plain = outcome(lambda i, m, t: _plain(i, m, *t, teacher=None, detach=detach), name, measure, detach, gate)
    assert len(lean) == len(plain)
    for got, want in zip(lean, plain, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@given(st.sampled_from(sorted(STRATEGIES)), st.integers(0, 9), st.floats(0.01, 0.99), st.booleans())
@settings(deadline=None)
def test_equal_outputs_blend_to_themselves(name, seed, alpha, half):
    frozen, _, inputs = (tensor.to(torch.bfloat16 if half else torch.float32) for tensor in states(seed))
    hidden, _alpha = STRATEGIES[name](HIDDEN, alpha=alpha)(frozen, frozen.clone(), inputs)
    assert torch.equal(hidden, frozen)


@pytest.mark.parametrize("name", ["lerp", "dlerp", "dlerpin", "prog", "proj", "slerp"])
def test_starts_at_the_weight_it_is_given(name):
    _, alpha = STRATEGIES[name](HIDDEN, alpha=0.2)(*states())
    torch.testing.assert_close(alpha, torch.full_like(alpha, 0.2))


def test_lerp_and_prog_by_hand():
    frozen, expanded, inputs = states()
    lerp, prog = trained("lerp"), trained("prog")
    w = torch.sigmoid(lerp.alpha_logit)
    torch.testing.assert_close(lerp(frozen, expanded, inputs)[0], (1 - w) * frozen + w * expanded)
    w, m = torch.sigmoid(prog.alpha_logit), torch.eye(HIDDEN) + prog.map_delta
    torch.testing.assert_close(prog(frozen, expanded, inputs)[0], (1 - w) * frozen @ m.T + w * expanded)


def test_gates_see_what_they_say():
    frozen, expanded, inputs = states()
    dlerp, dlerpin = trained("dlerp"), trained("dlerpin")
    both = torch.cat([frozen, expanded], -1)
    want = torch.sigmoid(F.linear(both, dlerp.gate_weight, dlerp.gate_bias))
    torch.testing.assert_close(dlerp(frozen, expanded, inputs)[1], want)
    want = torch.sigmoid(F.linear(inputs, dlerpin.gate_weight, dlerpin.gate_bias))
    torch.testing.assert_close(dlerpin(frozen, expanded, inputs)[1], want)


@given(st.floats(0.05, 3.0), st.floats(0.05, 0.95))
@settings(deadline=None)
def test_slerp_turns_by_its_share_of_the_angle(theta, w):
    a = torch.tensor([1.0, 0.0]).expand(1, 1, 2)
    b = torch.tensor([math.cos(theta), math.sin(theta)]).expand(1, 1, 2)
    out, _ = Slerp(2, alpha=w)(a, b, a)
    want = torch.tensor([math.cos(w * theta), math.sin(w * theta)]).expand(1, 1, 2)
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)


def test_one_aligned_token_leaves_the_others_on_their_arc():
    frozen, expanded, inputs = states()
    slerp = Slerp(HIDDEN, alpha=0.3)
    alone = slerp(frozen, expanded, inputs)[0]
    expanded[0, 0] = frozen[0, 0]
    together = slerp(frozen, expanded, inputs)[0]
    assert torch.equal(together[0, 0], frozen[0, 0])
    assert torch.equal(together[0, 1:], alone[0, 1:])


def test_router_picks_one_and_learns_from_the_task():
    frozen, expanded, inputs = states()
    router = trained("moe")
    hidden, alpha = router(frozen, expanded, inputs)
    assert set(alpha.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hidden, torch.where(alpha.bool(), expanded, frozen))
    hidden.square().sum().backward()
    assert router.router_weight.grad.abs().sum() > 0
    assert not trained("moe_hard")(frozen, expanded, inputs)[1].requires_grad


def test_a_tie_goes_to_the_twin_that_has_to_learn():
    assert MixtureOfTwo(HIDDEN)(*states())[1].all()


def test_divergences_by_hand():
    f, e = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 4.0]]])
    assert DIVERGENCES["mse"](f, e).item() == pytest.approx(12.5)
    assert DIVERGENCES["cosine"](f, e).item() == pytest.approx(0.5)  # smooth-L1 of 1
    assert DIVERGENCES["dot"](f, e).item() == pytest.approx(0.5 * 0.5 + 0.5 * 1)
    assert DIVERGENCES["cosine"](f, -f).item() == pytest.approx(1.5)  # of 2
    near = torch.tensor([[[3.0, 0.3]]])
    d = 1 - 3 / math.hypot(3, 0.3)
    assert DIVERGENCES["cosine"](f, near).item() == pytest.approx(d * d / 2, rel=1e-3)


def test_attention_divergence_is_a_kl():
    p, q = (torch.rand(2, 3, 4, 4).softmax(-1) for _ in range(2))
    want = F.kl_div(p.log(), q, reduction="none").sum(-1).mean(1)
    torch.testing.assert_close(attention_divergence(p, q), want, atol=1e-5, rtol=1e-4)
    assert attention_divergence(p, p).abs().max() == 0
