"""Weights that move with the step: alpha and the divergence's weight. A pure function of the step, so that resuming
needs nothing kept."""

import math

import torch
from torch import nn

from controlllm.config import ControlConfig, RampConfig
from controlllm.control.block import ControlBlock
from controlllm.control.expand import control_blocks
from controlllm.control.interpolation import logit


def ramp(start: float, way: RampConfig, *, step: int, done: float) -> float:
    """The value at optimizer step `step` (from 0), with a share `done` of the run behind it."""
    if way.final is None:
        return start
    done = min(1.0, step / max(1, way.steps - 1) if way.steps else done)
    shape = done if way.kind == "linear" else 0.5 * (1 - math.cos(math.pi * done))
    return start + (way.final - start) * shape


def set_step(model: nn.Module, control: ControlConfig, *, step: int, done: float) -> None:
    """Give every pair the weights of optimizer step `step`; done: 0 at the run's first step, 1 at its last."""
    weight = ramp(control.divergence_weight, control.divergence_schedule, step=step, done=done)
    alpha = ramp(control.alpha, control.alpha_schedule, step=step, done=done)
    for block in control_blocks(model):
        block.divergence_weight = weight
        if control.alpha_schedule.final is not None:
            parameter = block.interpolation.get_parameter("alpha_logit")
            for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):  # ZeRO-3 keeps another copy
                with torch.no_grad():
                    tensor.fill_(logit(alpha))


def mark_scheduled(model: nn.Module, control: ControlConfig) -> None:
    """Let checkpoints know that alpha changes although no gradient moves it."""
    for block in control_blocks(model):
        block.alpha_scheduled = control.alpha_schedule.final is not None


def scheduled_names(model: nn.Module) -> list[str]:
    """Names of the parameters that a schedule moves."""
    return [
        f"{name}.interpolation.alpha_logit"
        for name, module in model.named_modules()
        if isinstance(module, ControlBlock) and module.alpha_scheduled
    ]
