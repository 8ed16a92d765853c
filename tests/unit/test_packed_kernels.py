"""Packed documents stay apart in every kernel or the run is refused; empty batches count for nothing."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from families import perturb, tiny
from transformers.models.llama import modeling_llama

from controlllm.control.divergence import DIVERGENCES
from controlllm.control.head import linear_cross_entropy
from controlllm.control.interpolation import STRATEGIES
from controlllm.control.loss import forward_with_loss
from controlllm.control.model import expand_model
from controlllm.control.norm import RelaxedNorm
from controlllm.control.settings import ControlSettings
from controlllm.data.loader import collate, empty_batch
from controlllm.errors import UserError
from controlllm.train import attention, kernels
from controlllm.train.attention import refuse_leaks
from controlllm.train.kernels import use_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROW = {"input_ids": np.arange(3, 40), "lengths": np.array([30, 7]), "target": np.ones(37, bool)}


def model_of(kernel="packed", family="Llama", size=None, **settings):
    attention.register()
    kind = ControlSettings(**{"sites": [1, 3], "divergence": "mse"} | settings)
    return perturb(expand_model(tiny(family, kernel, **size or {}), kind)).train()


def check(kernel, *, family="Llama", use_cache=False, cast=False, size=None):
    model = model_of(kernel, family, size)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        refuse_leaks(
            lambda **batch: forward_with_loss(model, **batch, use_cache=use_cache),
            attention=kernel, vocabulary=99, device=CPU,
        )  # fmt: skip


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "Mixtral"])
@pytest.mark.parametrize("kernel", ["packed", "sdpa", "eager"])
def test_kernels_that_keep_documents_apart_pass(kernel, family, cast):
    check(kernel, family=family, cast=cast)


def test_flex_attention_passes():
    check("flex_attention", size={"num_attention_heads": 2})


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma3Text", "Mixtral"])
def test_a_cache_makes_sdpa_leak_and_is_refused(family, cast):
    with pytest.raises(
        UserError, match=r"model.attention sdpa lets the documents .* see each other .*: *set it|; set it to packed"
    ):
        check("sdpa", family=family, cast=cast, use_cache=True)


def test_the_check_leaves_random_numbers_as_they_were():
    model = model_of(size={"attention_dropout": 0.5})
    state = torch.get_rng_state()
    refuse_leaks(lambda **batch: forward_with_loss(model, **batch), attention="packed", vocabulary=99, device=CPU)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_gets_lengths_and_others_do_not(kernel):
    batch = collate([ROW])
    given = batch.arguments(kernel)
    assert given.keys() - batch.arguments("sdpa").keys() == {"cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert given["cu_seq_lens_k"].tolist() == given["cu_seq_lens_q"].tolist() == [0, 30, 37]
    assert type(given["max_length_q"]) is int
    assert given["max_length_q"] == given["max_length_k"] == 30


def test_flash_attention_is_called_with_the_documents(monkeypatch):
    """Its kernel needs a GPU; what transformers hands over to it does not."""
    from transformers import modeling_flash_attention_utils as flash

    calls = []

    def varlen(q, k, v, **given):
        calls.append(given)
        return q

    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_a, **_k: (
        (None, varlen, None, None, None),
        (lambda **given: {name: given[name] for name in ("max_seqlen_q", "max_seqlen_k")}, None),
    ))  # fmt: skip
    q = torch.randn(1, 37, 2, 4)
    given = collate([ROW]).arguments("flash_attention_2")
    del given["input_ids"], given["labels"]
    flash._flash_attention_forward(q, q, q, None, query_length=37, is_causal=True, **given)
    assert calls[0]["cu_seqlens_q"].tolist() == [0, 30, 37]
    assert calls[0]["max_seqlen_q"] == 30


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "none"])
@pytest.mark.parametrize("interpolation", STRATEGIES)
def test_an_empty_batch_has_loss_and_gradients_of_exactly_zero(interpolation, divergence):
    kernel = "eager" if divergence == "attention" else "packed"
    batch = empty_batch(ROW)
    assert (batch.targets, batch.tokens, len(batch.input_ids[0])) == (0, 0, 8)
    for fresh in (True, False):
        model = model_of(kernel, interpolation=interpolation, divergence=divergence)
        if fresh:
            model = expand_model(
                tiny("Llama", kernel), ControlSettings(sites=[1, 3], interpolation=interpolation, divergence=divergence)
            ).train()
        out = forward_with_loss(model, **batch.arguments(), num_items_in_batch=5, num_tokens_in_batch=9)
        assert out.loss == 0
        out.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert len(gradients) >= 18  # of the twins
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_an_empty_batch_of_a_short_row():
    assert empty_batch({"input_ids": np.array([5]), "lengths": np.array([1]), "target": np.array([True])}).targets == 0


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_a_cpu_runs_torchs_kernels(choice):
    model = model_of()
    assert use_kernels(model, choice, CPU) == "torch"
    assert not hasattr(model, "head_loss")


def test_liger_without_a_gpu_or_the_package_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"train.kernels liger needs a GPU, and this process runs on the cpu"):
        use_kernels(model_of(), "liger", CPU)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package liger-kernel"):
        use_kernels(model_of(), "liger", CUDA)
    assert use_kernels(model_of(), "auto", CUDA) == "torch"


@pytest.fixture
def liger(monkeypatch):
    """A package that patches instances and classes as Liger 0.8 does for Llama; the kernels are marks."""

    def rms_norm(self, hidden_states):
        return hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight

    def apply(*, model, cross_entropy, fused_linear_cross_entropy):
        assert not cross_entropy
        assert not fused_linear_cross_entropy
        modeling_llama.apply_rotary_pos_emb = rotary
        modeling_llama.LlamaRMSNorm = None
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.forward = rms_norm.__get__(norm)

    plain = modeling_llama.apply_rotary_pos_emb

    def rotary(*args, **kwargs):
        return plain(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", plain)
    package = ModuleType("liger_kernel.transformers.monkey_patch")
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(kernels, "find_spec", lambda name: SimpleNamespace())
    return SimpleNamespace(rotary=rotary)


def test_both_blocks_of_a_pair_are_patched_and_relaxed_norms_are_not(liger):
    model = model_of(norm_relaxation=0.5)
    classes = modeling_llama.LlamaRMSNorm
    names = list(dict(model.named_parameters()))
    batch = collate([ROW]).arguments()
    want = forward_with_loss(model, **batch).loss
    assert use_kernels(model, "auto", CUDA) == "liger"
    pair = model.model.layers[1]
    assert "forward" in vars(pair.frozen.input_layernorm)
    assert isinstance(relaxed := pair.expanded.input_layernorm, RelaxedNorm)
    assert "forward" not in vars(relaxed)
    assert "forward" in vars(relaxed.norm)
    assert "forward" in vars(model.model.layers[0].input_layernorm)
    assert modeling_llama.LlamaRMSNorm is classes
    assert modeling_llama.apply_rotary_pos_emb is liger.rotary
    assert list(dict(model.named_parameters())) == names
    assert model.head_loss is kernels.liger_cross_entropy
    model.head_loss = linear_cross_entropy
    torch.testing.assert_close(forward_with_loss(model, **batch).loss, want)


def test_a_family_that_liger_does_not_know(liger):
    model = model_of(family="SmolLM3")
    assert use_kernels(model, "auto", CUDA) == "torch"
    with pytest.raises(UserError, match="has no kernels for smollm3: it knows llama"):
        use_kernels(model, "liger", CUDA)
