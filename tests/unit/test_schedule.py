"""Alpha and the divergence's weight over the steps."""

import json

import pytest
import torch

from controlllm.config import ControlConfig, RampConfig
from controlllm.control.expand import control_blocks
from controlllm.control.model import expand_model
from controlllm.control.schedule import ramp, scheduled_names, set_step
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError


@pytest.mark.parametrize(("way", "values"), [
    ({}, [2, 2, 2, 2, 2]),
    ({"kind": "linear", "final": 0.0}, [2, 1.5, 1, 0.5, 0]),
    ({"kind": "cosine", "final": 0.0}, [2, 1 + 2**-0.5, 1, 1 - 2**-0.5, 0]),
    ({"kind": "linear", "final": 4.0, "steps": 3}, [2, 3, 4, 4, 4]),
])  # fmt: skip
def test_ramp(way, values):
    assert [ramp(2.0, RampConfig(**way), step=step, done=step / 4) for step in range(5)] == pytest.approx(values)


def test_every_pair_gets_the_weights_of_the_step(tiny_model):
    control = ControlConfig(
        num_expanded=2,
        train_alpha=False,
        alpha_schedule=RampConfig(kind="linear", final=0.9),
        divergence_schedule=RampConfig(kind="linear", final=0.0),
    )
    model = expand_model(tiny_model, ControlSettings.resolve(control, num_layers=4))
    for step, alpha, weight in [(0, 0.5, 1.0), (5, 0.7, 0.5), (10, 0.9, 0.0)]:
        set_step(model, control, step=step, done=step / 10)
        for block in control_blocks(model):
            assert torch.sigmoid(block.interpolation.alpha_logit).item() == pytest.approx(alpha)
            assert block.divergence_weight == pytest.approx(weight)


@pytest.mark.parametrize(("control", "says"), [
    ("{alpha_schedule: {kind: linear, final: 0.9}}", "set train_alpha to false"),
    ("{train_alpha: false, interpolation: dlerp, alpha_schedule: {kind: linear, final: 0.9}}", "dlerp has none"),
    ("{train_alpha: false, alpha_schedule: {kind: linear, final: 1.0}}", "between 0 and 1"),
    ("{divergence_schedule: {kind: linear}}", "needs final"),
    ("{divergence_schedule: {final: 2.0}}", "takes no final"),
    ("{layout: hybrid, num_expanded: 3}", "must be even, found 3"),
    ("{divergence: attention}", "set model.attention to eager"),
    ("{divergence: attention, teacher: trajectory}", "needs teacher: block"),
])  # fmt: skip
def test_mistakes_are_one_line(recipe, control, says):
    from controlllm.config import load_config

    with pytest.raises(UserError, match=says) as error:
        load_config(recipe, f"control={control}")
    assert "\n" not in str(error.value)


def test_a_run_ends_at_the_final_alpha_and_the_model_keeps_it(recipe, store):
    from transformers import AutoModelForCausalLM

    from controlllm.config import load_config
    from controlllm.pipeline import run

    schedule = "control={num_expanded: 2, train_alpha: false, alpha_schedule: {kind: linear, final: 0.8}}"
    run(load_config(recipe, schedule, "benchmark.items=2"), until="consolidate")
    (config,) = store.glob("consolidate/*/config.json")
    assert json.loads(config.read_text())["lineage"]["base_content"]
    model = AutoModelForCausalLM.from_pretrained(config.parent)
    assert len(scheduled_names(model)) == 0
    for block in control_blocks(model):
        assert torch.sigmoid(block.interpolation.alpha_logit).item() == pytest.approx(0.8)
