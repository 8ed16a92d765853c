"""What the probe measures, against transformers, finite differences and formulas."""

import math

import pytest
import torch
from families import tiny
from probing import base_model, expanded

from controlllm.control.expand import control_blocks, decoder_layers
from controlllm.probe.drift import drift, linear_cka
from controlllm.probe.lens import followed, lens
from controlllm.probe.measure import layers_of, see

IDS = [7, 100, 33, 250, 9, 61, 8]


@pytest.mark.parametrize("layout", ["concat", "stack", "hybrid"])
def test_names_of_layers_are_the_bases_own(layout):
    names = {
        "concat": ["in", "0", "1", "2", "3"],
        "stack": ["in", "0", "1", "1+", "2", "3", "3+"],
        "hybrid": ["in", "0", "1", "1+", "2", "3"],
    }
    found = layers_of(expanded(layout=layout))
    assert [layer.name for layer in found] == names[layout]
    assert [layer.kind for layer in found if layer.name in ("1", "3")] == {
        "concat": ["site", "site"], "stack": ["block", "block"], "hybrid": ["block", "site"]
    }[layout]  # fmt: skip


def test_site_changes_only_layers_from_itself_on():
    before, after = see(base_model(), IDS), see(expanded(moved=[0]), IDS)
    cosines = [drift(a, b)[0] for a, b in zip(before.states, after.states, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(before.states[:2], after.states[:2], strict=True))
    assert all((cosine < 1 - 1e-4).all() for cosine in cosines[2:])  # layer 1 is state 2
    assert (after.sites[1].distance > 0).all()
    assert (after.sites[3].distance == 0).all()
    assert not torch.equal(*after.sites[1].maps)
    assert torch.equal(*after.sites[3].maps)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Olmo2", "Mixtral"])
def test_states_and_lens_are_those_of_transformers(family):
    torch.manual_seed(0)
    model = tiny(family, "eager").eval().requires_grad_(False)
    ids = IDS[:1] + [i % 90 for i in IDS[1:]]
    seen = see(model, ids)
    out = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    for state, true in zip(seen.states[:-1], out.hidden_states, strict=False):
        torch.testing.assert_close(state, true[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.after_blocks(seen.states[-1]), out.hidden_states[-1][0], rtol=1e-5, atol=1e-6)
    logits = list(lens(model, seen.after_blocks, torch.stack(seen.states)))
    assert len(logits) == len(decoder_layers(model.base_model)) + 1
    torch.testing.assert_close(logits[-1], out.logits[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(model(torch.tensor([ids]), use_cache=False).logits, out.logits)  # it is whole again
    rows = followed(model, seen.after_blocks, torch.stack(seen.states))
    assert [row[-1]["kl"] for row in rows] == [0] * len(ids)
    assert rows[-1][-1]["ids"][0] == seen.target == out.logits[0, -1].argmax()
    assert rows[-1][0]["kl"] > 0
    assert rows[-1][-1]["p"][0] == pytest.approx(out.logits[0, -1].softmax(-1).max().item(), rel=1e-4)


@pytest.mark.parametrize("interpolation", ["lerp", "dlerp", "dlerpin", "slerp", "moe", "prog", "none"])
def test_rows_of_attention_are_shares_and_alpha_is_the_blends(interpolation):
    model = expanded(moved=[0, 1], interpolation=interpolation)
    seen = see(model, IDS)
    for site in seen.sites.values():
        for found in site.maps:
            torch.testing.assert_close(found.sum(-1), torch.ones(2, len(IDS)))
            assert not found.triu(1).any()
    with torch.no_grad():
        assert seen.sites[1].alpha.tolist() == pytest.approx([{"moe": 1, "none": 1}.get(interpolation, 0.5)] * len(IDS))
    if interpolation == "lerp":
        block = control_blocks(model)[0]
        inputs = seen.states[1][None]
        extra = {"position_embeddings": model.model.rotary_emb(inputs, torch.arange(len(IDS))[None])}
        mask = torch.full((1, 1, len(IDS), len(IDS)), -math.inf).triu(1)
        frozen, twin = (part(inputs, attention_mask=mask, **extra)[0] for part in (block.frozen, block.expanded))
        torch.testing.assert_close(torch.lerp(frozen, twin, 0.5), seen.states[2])
        torch.testing.assert_close(seen.sites[1].cosine, torch.cosine_similarity(frozen, twin, dim=-1))


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_dialled_model_shows_its_share(scale):
    seen = see(expanded(moved=[0, 1], alpha_scale=scale), IDS)
    assert set(seen.sites[1].alpha.tolist()) == {0.5 * scale}
    same = [torch.equal(a, b) for a, b in zip(see(base_model(), IDS).states, seen.states, strict=True)]
    assert all(same) == (scale == 0)


@pytest.mark.parametrize("settings", [None, {"interpolation": "dlerp"}, {"layout": "hybrid"}])
def test_importance_is_the_slope_of_the_logit(settings):
    model = (base_model() if settings is None else expanded(moved=[0], **settings)).double().requires_grad_(False)
    seen = see(model, IDS)
    embeddings = model.get_input_embeddings()(torch.tensor([IDS]))

    def logit(position, growth):
        grown = embeddings.clone()
        grown[0, position] *= 1 + growth
        return model(inputs_embeds=grown, use_cache=False).logits[0, -1, seen.target].item()

    slopes = [(logit(position, 1e-2) - logit(position, -1e-2)) / 2e-2 for position in range(len(IDS))]
    assert seen.importance.tolist() == pytest.approx(slopes, rel=5e-3, abs=3e-5)  # norms compute in float32
    assert max(map(abs, slopes)) > 1e-3


@pytest.mark.parametrize("samples", [6, 40])
def test_cka_is_the_unbiased_one(samples):
    random = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, 12, generator=random, dtype=torch.float64)
    y = x[:, :5] + torch.randn(samples, 5, generator=random, dtype=torch.float64)

    def hsic(k, kk):  # as Song et al. write it
        n, one = samples, torch.ones(samples, dtype=torch.float64)
        k, kk = k - k.diag().diag(), kk - kk.diag().diag()
        middle = (one @ k @ one) * (one @ kk @ one) / ((n - 1) * (n - 2))
        return ((k @ kk).trace() + middle - 2 / (n - 2) * (one @ k @ kk @ one)) / (n * (n - 3))

    k, kk = x @ x.T, y @ y.T
    assert linear_cka(x, y) == pytest.approx((hsic(k, kk) / (hsic(k, k) * hsic(kk, kk)).sqrt()).item())
    turned = torch.linalg.qr(torch.randn(12, 12, generator=random, dtype=torch.float64))[0]
    assert linear_cka(x, 3 * x @ turned + 1) == pytest.approx(1)
    assert linear_cka(x, x) == 1
    assert linear_cka(x[:3], x[:3]) is None


def test_cka_of_unrelated_states_is_nothing_on_average():
    random = torch.Generator().manual_seed(0)
    found = [linear_cka(*torch.randn(2, 30, 64, generator=random)) for _ in range(40)]
    assert abs(sum(found) / 40) < 0.03  # the biased one says about 0.7


def test_drift_of_states_by_hand():
    cosine, ratio = drift(
        torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), torch.tensor([[6.0, 8.0], [0.0, 2.0], [1.0, 0.0]])
    )
    assert cosine[:2].tolist() == pytest.approx([1, 0])
    assert ratio[:2].tolist() == pytest.approx([2, 2])
    assert cosine[2].isnan()
