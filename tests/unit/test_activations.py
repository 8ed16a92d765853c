"""Checkpointing and compilation change no number and no name; what they do is counted."""

import pytest
import torch
import torch._dynamo
from families import perturb, tiny
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from controlllm.control.loss import forward_with_loss
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError
from controlllm.train import attention
from controlllm.train.activations import blocks_with_gradient, checkpoint_activations
from controlllm.train.compiling import compile_blocks

MODES = ["none", "selective", "full"]
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _as_it_was():
    """Compilation and its settings are the process's."""
    config = torch._dynamo.config
    with config.patch(recompile_limit=config.recompile_limit, fail_on_recompile_limit_hit=False, optimize_ddp=True):
        yield
    torch._dynamo.reset()
    attention.register()


def model_of(kernel="packed", family="Llama", **settings):
    attention.register()
    kind = ControlSettings(**{"sites": [1, 3], "divergence": "mse"} | settings)
    return perturb(expand_model(tiny(family, kernel), kind)).train()


def batch_of(tokens, seed=0):
    """Two documents in a row."""
    first = tokens // 3
    ids = torch.randint(3, 99, (1, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, [0, first]] = -100
    positions = torch.cat([torch.arange(first), torch.arange(tokens - first)])[None]
    edges = torch.tensor([0, first, tokens], dtype=torch.int32)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "cu_seq_lens_q": edges, "use_cache": False}


def step(model, tokens=24, **more):
    model.zero_grad()
    loss = forward_with_loss(model, **batch_of(tokens, tokens), **more).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-5, msg=name)


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] = self.calls.get(func, 0) + 1
        return func(*args, **(kwargs or {}))

    def of(self, *operators):
        return sum(self.calls.get(operator, 0) for operator in operators)


def counted(model):
    with Count() as count:
        step(model)
    return count


@pytest.mark.parametrize("layout", ["concat", "stack", "hybrid"])
@pytest.mark.parametrize("kernel", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES[1:])
def test_gradients_are_bitwise_those_of_keeping_all(mode, kernel, layout):
    model = model_of(kernel, layout=layout)
    names = list(dict(model.named_parameters()))
    want = step(model)
    checkpoint_activations(model, mode)
    assert list(dict(model.named_parameters())) == names
    assert equal(step(model), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = step(model)
        for block in blocks_with_gradient(model):
            block.forward = block.forward.forward
        assert equal(step(model), again)


PRODUCTS = (aten.mm.default, aten.bmm.default, aten._scaled_dot_product_flash_attention_for_cpu.default)


def test_selective_repeats_no_product_and_full_repeats_each_once():
    counts = {}
    for mode in MODES:
        model = model_of()
        checkpoint_activations(model, mode)
        counts[mode] = counted(model)
    products = {mode: count.of(*PRODUCTS) for mode, count in counts.items()}
    norms = {mode: count.of(aten.rsqrt.default) for mode, count in counts.items()}
    assert products["selective"] == products["none"]
    assert products["full"] > products["none"]
    assert norms["selective"] > norms["none"]


@pytest.mark.parametrize(("sites", "wrapped"), [([3], 1), ([2, 3], 3), ([0], 4)])
def test_nothing_below_the_lowest_trained_tensor_is_repeated(sites, wrapped):
    model = model_of(sites=sites)
    assert len(blocks_with_gradient(model)) == wrapped
    below = counted(model).of(aten.rsqrt.default)
    checkpoint_activations(model, "full")
    assert counted(model).of(aten.rsqrt.default) == below + 2 * wrapped  # two norms in a block


def test_a_trained_embedding_checkpoints_every_block():
    model = tiny("Llama").train()
    assert len(blocks_with_gradient(model)) == 4
    model = model_of(sites=[3])
    model.get_input_embeddings().requires_grad_(True)
    assert len(blocks_with_gradient(model)) == 5


def kept_bytes(model):
    """Of distinct storage that autograd keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward_with_loss(model, **batch_of(48)).loss
    assert loss.requires_grad
    return sum(size for place, size in kept.items() if place not in weights)


def test_checkpointed_blocks_keep_less():
    model = model_of("sdpa")
    everything = kept_bytes(model)
    checkpoint_activations(model, "full")
    assert kept_bytes(model) < 0.5 * everything


@pytest.mark.parametrize(("kernel", "mode"), [
    ("packed", "full"),
    pytest.param("packed", "none", marks=pytest.mark.slow),
    pytest.param("sdpa", "selective", marks=pytest.mark.slow),
])  # fmt: skip
def test_compiled_is_uncompiled_at_ten_lengths_from_a_few_forms(kernel, mode):
    plain, model = small(kernel), small(kernel)
    names = list(dict(model.named_parameters()))
    checkpoint_activations(model, mode)
    forms = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, forms)
    assert list(dict(model.named_parameters())) == names
    counts = []
    for tokens in range(20, 30):
        close(step(model, tokens), step(plain, tokens))
        if tokens in (20, 25):
            validate(model.eval(), tokens)
            model.train()
        counts.append(forms.frame_count)
    assert 0 < counts[0] == counts[-1]


def small(kernel):
    attention.register()
    base = tiny("Llama", kernel, num_hidden_layers=2)
    return perturb(expand_model(base, ControlSettings(sites=[1], divergence="mse"))).train()


@torch.no_grad()
def validate(model, tokens):
    return forward_with_loss(model, **batch_of(tokens), measure_divergence=False)


def test_compiled_blocks_can_be_profiled_and_counted():
    plain, model = small("sdpa"), small("sdpa")
    want = step(plain)
    compile_blocks(model, "aot_eager")
    step(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        close(step(model), want)
    assert any(event.key == "aten::mm" for event in profile.key_averages())
    with FlopCounterMode(display=False) as counter:
        close(step(model), want)
    with FlopCounterMode(display=False) as uncompiled:
        step(plain)
    assert counter.get_total_flops() == uncompiled.get_total_flops()


def test_attention_maps_and_compilation_are_refused_together():
    with pytest.raises(UserError, match=r"train.compile aot_eager and control.divergence attention"):
        compile_blocks(model_of("eager", divergence="attention"), "aot_eager")
