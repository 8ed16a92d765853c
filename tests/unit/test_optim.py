"""Groups, rates, and optimizers with less memory: against plain AdamW, by enumeration, and through a restart."""

import copy
import math
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from controlllm.config import ControlConfig, ScheduleConfig, TrainConfig
from controlllm.control.model import expand_model, number_of_layers
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError
from controlllm.train.low_precision import AdamWBf16, round_stochastic
from controlllm.train.optim import learning_rate, make_optimizer, set_rates

KINDS = ("cosine", "linear", "constant", "wsd")
EACH = [
    pytest.param({"optimizer": {"name": "adamw"}}, id="adamw"),
    pytest.param({"optimizer": {"name": "adamw_8bit"}}, id="adamw_8bit"),
    pytest.param({"precision": "bf16_stochastic"}, id="bf16_stochastic"),
    pytest.param({"precision": "bf16_kahan"}, id="bf16_kahan"),
]


def train_config(**changes):
    return TrainConfig.model_validate({"precision": "float32", "lr": 1e-3} | changes)


def expanded(model):
    control = ControlConfig(num_expanded=2, interpolation="dlerp", norm_relaxation="learned")
    return expand_model(model, ControlSettings.resolve(control, num_layers=number_of_layers(model)))


def test_what_is_trained_is_in_the_group_it_belongs_to(tiny_model):
    model = expanded(tiny_model)
    optimizer = make_optimizer(model, train_config(optimizer={"weight_decay": 0.1, "alpha_lr": 0.01}))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = {
        group["name"]: {
            names[id(p)].partition("expanded.")[2] or names[id(p)].rpartition(".")[2] for p in group["params"]
        }
        for group in optimizer.param_groups
    }
    assert kinds["alphas"] == {"gate_weight", "gate_bias"} | {
        f"{norm}_layernorm.relaxation_logit" for norm in ("input", "post_attention")
    }
    assert kinds["vectors"] == {f"{norm}_layernorm.norm.weight" for norm in ("input", "post_attention")}
    assert kinds["matrices"] == {f"self_attn.{x}_proj.weight" for x in "qkvo"} | {
        f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")
    }
    given = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(given) < len(list(model.parameters()))
    facts = {g["name"]: (g["weight_decay"], g["peak"]) for g in optimizer.param_groups}
    assert facts == {"matrices": (0.1, 1e-3), "vectors": (0.0, 1e-3), "alphas": (0.0, 0.01)}


def test_only_matrices_decay_and_every_group_has_its_rate(tiny_model):
    model = expanded(tiny_model)
    config = train_config(steps=10, schedule={"warmup_steps": 4}, optimizer={"weight_decay": 0.5, "alpha_lr": 0.01})
    optimizer = make_optimizer(model, config)
    assert set_rates(optimizer, config, step=1, tokens=0) == pytest.approx(0.5e-3)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups}["alphas"] == pytest.approx(0.005)
    before = {p: p.detach().clone() for p in model.parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    shrunk = {id(p) for p in optimizer.param_groups[0]["params"]}
    for p, old in before.items():
        torch.testing.assert_close(p.detach(), old * (1 - 0.5e-3 * 0.5) if id(p) in shrunk else old, rtol=1e-7, atol=0)


def test_without_a_rate_of_their_own_alphas_have_that_of_the_run(tiny_model):
    groups = make_optimizer(expanded(tiny_model), train_config()).param_groups
    assert {group["peak"] for group in groups} == {1e-3}


@st.composite
def runs(draw):
    steps = draw(st.integers(1, 300))
    fractions = st.floats(0, 1)
    schedule = ScheduleConfig(
        kind=draw(st.sampled_from(KINDS)),
        warmup_steps=draw(st.integers(0, steps - 1)),
        final_fraction=draw(fractions),
        decay_fraction=draw(st.floats(0.01, 1)),
    )
    return train_config(steps=steps, schedule=schedule)


def rates(config):
    return [learning_rate(config, step=step, tokens=0) for step in range(config.steps)]


@given(runs())
def test_the_rate_rises_to_the_peak_and_goes_down_to_its_end(config):
    warmup, final, steps = config.schedule.warmup_steps, config.schedule.final_fraction, config.steps
    found = rates(config)
    assert found[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    after = found[warmup:]
    assert after == sorted(after, reverse=True)
    assert after[0] == pytest.approx(1)
    assert all(final - 1e-9 <= rate <= 1 + 1e-9 for rate in after)
    if len(after) > 1:
        assert after[-1] == pytest.approx(1 if config.schedule.kind == "constant" else final)
        share = config.schedule.decay_fraction * (steps - 1) if config.schedule.kind == "wsd" else math.inf
        steepest = math.pi / 2 / min(len(after) - 1, share)  # of a cosine over its length; of a line it is less
        assert all(a - b <= steepest * (1 - final) + 1e-9 for a, b in pairwise(after))


@given(runs())
def test_the_shapes_are_what_their_names_say(config):
    schedule, length = config.schedule, config.steps - 1 - config.schedule.warmup_steps
    for step, rate in enumerate(rates(config)[schedule.warmup_steps :]):
        done = step / max(1, length)
        left = (config.steps - 1 - schedule.warmup_steps - step) / (schedule.decay_fraction * max(1, config.steps - 1))
        shape = {
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "linear": 1 - done,
            "constant": 1,
            "wsd": 1 if length == 0 else min(1, max(left, 1 - done)),
        }[schedule.kind]
        assert rate == pytest.approx(schedule.final_fraction + (1 - schedule.final_fraction) * shape, abs=1e-9)


@given(runs(), st.integers(1, 100_000))
def test_equal_steps_measured_in_tokens_have_the_same_rates(config, size):
    schedule = config.schedule.model_copy(
        update={"warmup_steps": 0, "warmup_tokens": config.schedule.warmup_steps * size}
    )
    by_tokens = train_config(steps=None, tokens=config.steps * size, schedule=schedule)
    found = [learning_rate(by_tokens, step=0, tokens=step * size, step_tokens=size) for step in range(config.steps)]
    assert found == pytest.approx(rates(config), abs=1e-12)


def test_a_run_in_tokens_may_end_in_any_step():
    config = train_config(steps=None, tokens=1000, schedule={"warmup_tokens": 100, "final_fraction": 0.2})
    assert learning_rate(config, step=9, tokens=999, step_tokens=500) == pytest.approx(0.2)
    assert learning_rate(config, step=0, tokens=0, step_tokens=5000) == 1


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**127), max_value=2.0**127))
@settings(max_examples=50)
def test_stochastic_rounding_has_the_exact_mean(value):
    exact = torch.tensor(value, dtype=torch.float32)
    rounded = round_stochastic(exact.expand(1 << 16).contiguous(), torch.arange(1 << 16, dtype=torch.int32))
    neighbours = rounded.double().unique()
    assert rounded.dtype == torch.bfloat16
    assert len(neighbours) <= 2
    assert neighbours[0] <= exact <= neighbours[-1]
    assert (rounded.double() / (1 << 16)).sum() == exact.double()


def regression(optimizer_of, dtype, *, steps=400):
    """Weights of a linear regression that starts near its solution; weights are about 1, steps about 1e-3."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 48, generator=generator)
    solution = 1 + torch.rand(48, 8, generator=generator)
    start = (solution + 0.2 * torch.randn(48, 8, generator=generator)).bfloat16()
    weight = torch.nn.Parameter(start.to(dtype))
    optimizer = optimizer_of([{"params": [weight], "lr": 1e-3}])
    for _ in range(steps):
        ((inputs @ weight.float() - inputs @ solution).square().sum() / 64).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weight.detach().float(), start.float()


def bf16(kahan, **changes):
    return lambda groups: AdamWBf16(groups, **{"betas": (0.9, 0.95), "eps": 1e-8, "kahan": kahan, "seed": 1} | changes)


def adamw(groups):
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0, fused=True)


def test_small_steps_are_lost_in_plain_bf16_and_in_neither_of_ours():
    exact, start = regression(adamw, torch.float32)
    way = (exact - start).abs().mean()
    plain, _ = regression(adamw, torch.bfloat16)
    assert (plain - start).abs().mean() < 0.1 * way
    for kahan, noise in ((False, 0.2), (True, 0.1)):  # a weight that is rounded at random stays uncertain by it
        ours, _ = regression(bf16(kahan), torch.bfloat16)
        assert (ours - exact).abs().mean() < noise * way


@given(st.integers(0, 1000), st.floats(1e-5, 3e-3))
@settings(max_examples=5, deadline=None)
def test_a_compensated_sum_is_the_float32_sum_within_a_rounding(seed, lr):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(64, generator=generator).bfloat16()
    grads = torch.randn(1000, 64, generator=generator)
    ends = []
    for of, dtype in ((bf16(True, betas=(0.0, 0.0)), torch.bfloat16), (adamw, torch.float32)):
        weight = torch.nn.Parameter(start.clone().to(dtype))
        optimizer = of([{"params": [weight], "lr": lr, "betas": (0.0, 0.0), "weight_decay": 0.1}])
        for grad in grads:  # with both betas 0 a step is the gradient's sign
            weight.grad = grad.to(dtype)
            optimizer.step()
        ends.append(weight.detach().float())
    ours, exact = ends
    spacing = torch.maximum(exact.abs(), start.float().abs()).log2().floor().exp2() * 2**-7  # where it was largest
    assert ((ours - exact).abs() <= spacing).all()


@pytest.mark.parametrize("kahan", [False, True])
def test_the_mean_of_squares_goes_down_in_bf16_too(kahan):
    weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = bf16(kahan, betas=(0.9, 0.999))([{"params": [weight], "lr": 1e-6}])
    optimizer.state[weight]["exp_avg_sq"].fill_(1.0)
    weight.grad = torch.zeros_like(weight)
    for _ in range(300):
        optimizer.step()
    found = optimizer.state[weight]["exp_avg_sq"].float().mean().item()
    assert found == pytest.approx(0.999**300, rel=0.01)


def test_random_bits_differ_by_seed_step_place_and_piece():
    def ends(seed=1, steps=1, size=64, piece=64):
        weights = [torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = bf16(False, seed=seed, piece=piece)([{"params": weights, "lr": 1e-3}])
        for _ in range(steps):
            before = [w.detach().clone() for w in weights]
            for w in weights:
                w.grad = torch.ones_like(w)
            optimizer.step()
        return [(w.detach() < b).tolist() for w, b in zip(weights, before, strict=True)]

    first, second = ends()
    assert first != second
    assert first != ends(seed=2)[0]
    assert first != ends(steps=2)[0]
    long = ends(size=128)[0]
    assert long[:64] == first
    assert long[64:] != first


class Small(torch.nn.Module):
    """Sizes that are and are not whole blocks of 8-bit state, narrow and small tensors, and a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(300, 24), torch.nn.Tanh(), torch.nn.Linear(24, 512, bias=False),
            torch.nn.Tanh(), torch.nn.Linear(512, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def steps_of(model, optimizer, numbers, config):
    dtype = next(model.parameters()).dtype
    for number in numbers:
        x = torch.randn(8, 300, generator=torch.Generator().manual_seed(number))
        set_rates(optimizer, config, step=number, tokens=0)
        model(x.to(dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def made(changes):
    if changes.get("optimizer", {}).get("name") == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    config = train_config(steps=12, **changes)
    model = Small().to(torch.bfloat16 if "bf16" in config.precision else torch.float32)
    return model, make_optimizer(model, config), config


@pytest.mark.parametrize("changes", EACH)
@pytest.mark.parametrize("way", ["in place", "state_dict"])
def test_a_restart_changes_no_bit(changes, way):
    whole, optimizer, config = made(changes)
    steps_of(whole, optimizer, range(4), config)
    weights = copy.deepcopy(whole.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    steps_of(whole, optimizer, range(4, 8), config)

    again, fresh, _ = made(changes)
    again.load_state_dict(weights)
    if way == "state_dict":
        fresh.load_state_dict(saved)
    else:
        for parameter, values in zip((p for g in fresh.param_groups for p in g["params"]), saved["state"].values()):  # noqa: B905
            assert fresh.state[parameter].keys() == values.keys()
            for name, tensor in fresh.state[parameter].items():
                tensor.copy_(values[name])
    steps_of(again, fresh, range(4, 8), config)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    for a, b in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("changes", EACH)
def test_the_state_is_plain_tensors_and_there_from_the_start(changes):
    model, optimizer, config = made(changes)
    before = {p: {name: (t.shape, t.dtype) for name, t in optimizer.state[p].items()} for p in model.parameters()}
    assert all(type(t) is torch.Tensor and not t.any() for p in before for t in optimizer.state[p].values())
    steps_of(model, optimizer, range(1), config)
    for p, facts in before.items():
        assert {name: (t.shape, t.dtype) for name, t in optimizer.state[p].items()} == facts
        assert optimizer.state[p]["step"] == 1


def test_eight_bits_follow_thirty_two(tmp_path):
    ends = {}
    for changes in ({}, {"optimizer": {"name": "adamw_8bit"}}):
        model, optimizer, config = made(changes)
        start = [p.detach().clone() for p in model.parameters()]
        steps_of(model, optimizer, range(12), config)
        ends[len(ends)] = torch.cat(
            [(p.detach() - s).flatten() for p, s in zip(model.parameters(), start, strict=True)]
        )
    exact, ours = ends[0], ends[1]
    assert (ours - exact).norm() < 0.1 * exact.norm()
    state = {tuple(p.shape): optimizer.state[p] for p in model.parameters()}
    assert state[(24, 300)]["exp_avg"].shape == (24, 512)
    assert state[(24, 300)]["exp_avg_scale"].shape == (24, 2)
    assert state[(10, 512)]["exp_avg_sq"].dtype == torch.uint8
    assert {state[shape]["exp_avg"].dtype for shape in ((512, 24), (24,), (10,))} == {torch.float32}


def test_a_row_without_gradient_stays_in_eight_bits(tmp_path):
    model, optimizer, _ = made({"optimizer": {"name": "adamw_8bit"}})
    weight = model.layers[0].weight
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    weight.grad[3] = 0
    for _ in range(3):
        optimizer.step()
    assert torch.equal(weight[3], before[3])
    assert torch.isfinite(weight).all()
    assert (weight != before).sum() == 23 * 300


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(
        UserError, match=r"adamw_8bit: bitsandbytes is not installed; pip install 'controlllm\[quant\]'"
    ):
        make_optimizer(Small(), train_config(optimizer={"name": "adamw_8bit"}))
