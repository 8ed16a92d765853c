"""Head and cross-entropy in chunks are the plain formulas; nothing of the size targets × vocabulary is made."""

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, IDS, perturb, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from controlllm.control import head, loss
from controlllm.control.head import chunk_rows, linear_cross_entropy
from controlllm.control.loss import forward_with_loss
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings

LABELS = torch.where(torch.arange(17) % 3 > 0, IDS, -100)
PLAIN = {family for family in FAMILIES if family != "Gemma2"}  # whose logits are capped


def tensors(targets, vocabulary, *, bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, 8, generator=generator).requires_grad_() for size in (targets, vocabulary))
    extra = torch.randn(vocabulary, generator=generator).requires_grad_() if bias else None
    return hidden, weight, extra, torch.randint(vocabulary, (targets,), generator=generator)


def plain(hidden, weight, bias, targets):
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")


def outcome(function, *inputs, scale=0.3):
    value = function(*inputs)
    (value * scale).backward()
    return value.detach(), *(tensor.grad for tensor in inputs[:3] if tensor is not None)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 23), st.integers(2, 50), st.integers(1, 30), st.booleans(), st.sampled_from([None, torch.bfloat16])
)
def test_loss_and_gradients_are_the_plain_ones(targets, vocabulary, chunk, bias, autocast):
    def ours(*inputs):
        return linear_cross_entropy(*inputs, chunk=chunk)

    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        got = outcome(ours, *tensors(targets, vocabulary, bias=bias))
        want = outcome(plain, *tensors(targets, vocabulary, bias=bias))
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if autocast is None else {"atol": 3e-2, "rtol": 3e-2}
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)


def test_what_is_frozen_has_no_gradient():
    hidden, weight, bias, targets = tensors(9, 20, bias=True)
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, bias, targets, chunk=4).backward()
    assert weight.grad is None
    assert bias.grad is not None
    hidden, weight, _, targets = tensors(9, 20, bias=False)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, None, targets).requires_grad


@pytest.mark.parametrize("vocabulary", [258, 32_000, 49_152, 128_256, 262_144])
def test_a_chunk_takes_64_to_128_mebibytes(vocabulary):
    assert 64 << 20 <= chunk_rows(vocabulary) * 4 * vocabulary <= 128 << 20


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made while inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def model_of(family, attention="sdpa", **changes):
    settings = ControlSettings(sites=[1, 3], divergence="mse", divergence_alpha="constant")
    return perturb(expand_model(tiny(family, attention, **changes), settings)).train()


def step(model, **arguments):
    model.zero_grad()
    out = forward_with_loss(model, IDS, labels=LABELS, use_cache=False, **arguments)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_as_with_its_own_logits(family, trained_head):
    model = model_of(family)
    model.get_output_embeddings().requires_grad_(trained_head)
    want, gradients = step(model, all_logits=True)
    for _ in range(2):  # the first pass finds out whether the head is plain
        got, ours = step(model)
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.cross_entropy, want.cross_entropy)
        assert ours.keys() == gradients.keys()
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, gradients[name], atol=2e-6, rtol=1e-4)
    assert loss._PLAIN_HEAD[model] == (family in PLAIN)


CHANGED = {
    "Granite": {"logits_scaling": 3.0}, "Cohere": {"logit_scale": 0.25}, "Gemma2": {"head_dim": 8},
    "Gemma3Text": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "MiniCPM3": {"dim_model_base": 16, "num_key_value_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("family", CHANGED)
def test_what_a_family_does_to_its_logits_is_found_and_kept(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, CHANGED[family])
    model = tiny(family).train()
    want, gradients = step(model, all_logits=True)
    got, ours = step(model)
    torch.testing.assert_close(got.loss, want.loss)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, gradients[name], atol=2e-6, rtol=1e-4)


def test_no_tensor_is_as_large_as_all_logits(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 99 * 4)
    model = model_of("Llama")
    ids = IDS.repeat(1, 3)
    with Largest() as largest:
        forward_with_loss(model, ids, labels=ids, use_cache=False).loss.backward()
    assert largest.elements < ids[:, 1:].numel() * 99


def test_a_batch_without_targets_has_a_loss_of_zero_and_reaches_every_trained_tensor():
    model = model_of("Llama")
    model.get_output_embeddings().requires_grad_(True)
    out = forward_with_loss(model, IDS, labels=torch.full_like(IDS, -100), use_cache=False)
    assert out.cross_entropy == 0
    out.loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_a_head_with_an_adapter_keeps_it():
    class Adapted(torch.nn.Linear):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    model = model_of("Llama")
    model.get_output_embeddings().__class__ = Adapted
    want, _ = step(model, all_logits=True)
    torch.testing.assert_close(step(model)[0].loss, want.loss)
