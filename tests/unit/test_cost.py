"""A step costs what the formula says, nothing below the lowest site is differentiated, and a blend keeps one tensor."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from controlllm.config import ControlConfig
from controlllm.control.cost import (
    ModelFlops,
    StepFlops,
    config_flops,
    control_step,
    full_step,
    model_flops,
    partial_step,
)
from controlllm.control.expand import control_blocks, decoder_layers
from controlllm.control.loss import forward_with_loss
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.train.profiling import flop_counter

BATCH, SEQ = 2, 32
IDS = torch.randint(0, 64, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
LLAMA_8B = model_flops(
    hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocabulary=128256, layers=32, seq=8192,
    tokens=8192,
)  # fmt: skip


def llama(layers=32, *, hidden=32):
    """Eager attention, whose products the counter sees and which multiplies what the mask hides."""
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, vocab_size=1024, use_cache=False, attn_implementation="eager"
    )
    return LlamaForCausalLM(config).train()


def settings(num_expanded, sites, *, layers=32, **changes):
    return ControlSettings.resolve(ControlConfig(num_expanded=num_expanded, sites=sites, **changes), num_layers=layers)


def base_flops(model) -> ModelFlops:
    """The last position of every row has no target."""
    return config_flops(model.config, seq=SEQ, tokens=BATCH * SEQ, targets=BATCH * (SEQ - 1), causal=False)


def measured(model) -> StepFlops:
    with flop_counter() as forward:
        loss = forward_with_loss(model, IDS, labels=IDS).loss
    with flop_counter() as backward:
        loss.backward()
    return StepFlops(forward.get_total_flops(), backward.get_total_flops())


@pytest.mark.parametrize("placement", ["evenly", "top", "every_nth_of_top"])
@pytest.mark.parametrize("num_expanded", [4, 8, 16])
def test_step_costs_what_the_formula_says(num_expanded, placement):
    model = llama()
    base, control = base_flops(model), settings(num_expanded, placement)
    assert_equal(measured(expand_model(model, control)), control_step(base, control))


@pytest.mark.parametrize(
    ("sites", "changes"),
    [
        ([2, 3, 9, 14], {"layout": "stack"}),
        ([2, 3, 9, 14], {"layout": "hybrid"}),
        ([0, 15], {"divergence": "none"}),
        ([5, 6], {"teacher": "trajectory"}),
        ([5, 6], {"detach_teacher": False}),
        ([0, 15], {"interpolation": "slerp", "divergence": "cosine"}),
        ([2, 6, 9], {"interpolation": "none"}),
        ([2, 3, 9, 14], {"interpolation": "none", "layout": "hybrid"}),
        ([2, 6, 9], {"interpolation": "none", "detach_teacher": False}),
    ],
    ids=str,
)
def test_every_layout_costs_the_same(sites, changes):
    model = llama(16)
    base, control = base_flops(model), settings(len(sites), sites, layers=16, **changes)
    assert_equal(measured(expand_model(model, control)), control_step(base, control))


def test_rivals_cost_what_the_formulas_say():
    model, sites = llama(16), [3, 7, 11, 15]
    assert_equal(measured(model), full_step(base_flops(model)))
    model.requires_grad_(False)
    for site in sites:
        model.model.layers[site].requires_grad_(True)
    assert_equal(measured(model), partial_step(base_flops(model), sites))


def assert_equal(found: StepFlops, expected: StepFlops):
    assert found.total == pytest.approx(expected.total, rel=1e-3)  # the head's gradient is made in the forward pass


@pytest.mark.parametrize(
    ("num_expanded", "evenly", "top", "cached_evenly", "cached_top"),
    [(4, 0.737, 0.504, 0.669, 0.231), (8, 0.899, 0.666, 0.869, 0.431), (16, 1.156, 0.989, 1.146, 0.833)],
)
def test_llama_8b_against_full_fine_tuning(num_expanded, evenly, top, cached_evenly, cached_top):
    expected = {"evenly": (evenly, cached_evenly), "top": (top, cached_top)}
    for placement, ratios in expected.items():
        control = settings(num_expanded, placement)
        for cached, ratio in zip((False, True), ratios, strict=True):
            total = control_step(LLAMA_8B, control, cached_prefix=cached).total
            assert total / full_step(LLAMA_8B).total == pytest.approx(ratio, abs=5e-4)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("layout", ["concat", "stack", "hybrid"])
def test_nothing_below_the_lowest_site_is_differentiated(layout):
    model = llama(8)
    model = expand_model(model, settings(2, [4, 6], layers=8, layout=layout))
    in_graph, differentiated = {}, set()
    layers = decoder_layers(model.base_model)
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda _layer, _inputs, out, i=index: in_graph.update({i: out.requires_grad}))
        layer.register_full_backward_hook(lambda *_gradients, i=index: differentiated.add(i))
    model.get_input_embeddings().register_forward_hook(lambda *io: in_graph.update(embedding=io[-1].requires_grad))
    forward_with_loss(model, IDS, labels=IDS).loss.backward()
    lowest = 4 if layout == "concat" else 5
    assert (
        {where for where, yes in in_graph.items() if yes}
        == differentiated | {lowest}
        == set(range(lowest, len(layers)))
    )
    assert in_graph["embedding"] is False


class Sum(nn.Module):
    """The two blocks of a pair without blend and divergence: an addition keeps nothing."""

    def __init__(self, block):
        super().__init__()
        self.frozen, self.expanded = block.frozen, block.expanded

    def forward(self, hidden_states, *args, **kwargs):
        return self.frozen(hidden_states, *args, **kwargs) + self.expanded(hidden_states, *args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["mse", "none"])
def test_a_site_keeps_one_tensor(divergence, dtype):
    assert kept_per_site("lerp", divergence, dtype) <= 1.01


@pytest.mark.parametrize(
    ("interpolation", "divergence"),
    [("lerp", "cosine"), ("lerp", "dot"), ("dlerp", "mse"), ("dlerpin", "mse"), ("slerp", "mse"), ("slerp", "cosine")],
)
def test_a_recomputed_site_keeps_one_tensor(interpolation, divergence):
    """And, where the gate looks at the input, all sites together the lowest one's, which nobody else keeps."""
    shared = 1 / 3 if interpolation == "dlerpin" else 0
    assert kept_per_site(interpolation, divergence, torch.float32) <= 1.01 + shared


def kept_per_site(interpolation, divergence, dtype, *, sites=(1, 3, 4)) -> float:
    """Tensors of (batch, seq, hidden) in `dtype` that blend and divergence keep for the backward pass."""
    hidden = 512
    control = settings(len(sites), list(sites), layers=6, interpolation=interpolation, divergence=divergence)
    model = expand_model(llama(6, hidden=hidden), control).to(dtype)
    assert control.train_alpha
    with kept_bytes(model) as whole:
        loss = forward_with_loss(model, IDS, labels=IDS).loss
    del loss
    layers = decoder_layers(model.base_model)
    for index in sites:
        layers[index] = Sum(layers[index])
    assert not control_blocks(model)
    with kept_bytes(model) as blocks:
        loss = forward_with_loss(model, IDS, labels=IDS).loss
    del loss
    return (sum(whole.values()) - sum(blocks.values())) / (len(sites) * BATCH * SEQ * hidden * dtype.itemsize)


@contextmanager
def kept_bytes(model) -> Iterator[dict[int, int]]:
    """Bytes by storage of all activations that autograd keeps, for as long as the graph lives."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
