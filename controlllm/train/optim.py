"""Optimizer over what is trained, and its learning rate as a function of how far the run is."""

import math
from typing import Any

import torch
from torch import nn

from controlllm.config import ScheduleConfig, TrainConfig
from controlllm.control.expand import control_blocks
from controlllm.train.low_precision import AdamW8bit, AdamWBf16
from controlllm.train.trained import shape


def make_optimizer(model: nn.Module, config: TrainConfig, *, with_state: bool = True) -> torch.optim.Optimizer:
    """AdamW as the settings say, in groups `matrices`, `vectors` and `alphas`, each with its peak rate in `peak`.

    The weights must be in place (not on the meta device). The state of every parameter exists from the start, so that
    a checkpoint always finds the same tensors; with_state: false where another puts its own parameters and state in its
    place. UserError when adamw_8bit needs a package that is not installed.
    """
    groups = _groups(model, config)
    betas, eps = (config.optimizer.beta1, config.optimizer.beta2), config.optimizer.eps
    if config.precision in ("bf16_stochastic", "bf16_kahan"):
        return AdamWBf16(groups, betas=betas, eps=eps, kahan=config.precision == "bf16_kahan", seed=config.seed)
    if config.optimizer.name == "adamw_8bit":
        return AdamW8bit(groups, betas=betas, eps=eps)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    for group in optimizer.param_groups if with_state else ():
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device)} | moments
    return optimizer


def set_rates(
    optimizer: torch.optim.Optimizer, config: TrainConfig, *, step: int, tokens: int, step_tokens: int = 0
) -> float:
    """Give every group its rate for the next step (arguments as of `learning_rate`); returns that of `train.lr`."""
    factor = learning_rate(config, step=step, tokens=tokens, step_tokens=step_tokens)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return config.lr * factor


def learning_rate(config: TrainConfig, *, step: int, tokens: int, step_tokens: int = 0) -> float:
    """The rate of the next step as a share of the peak: a linear rise, then the schedule's shape.

    step, tokens: done so far. step_tokens: of the step that comes, where the run is measured in tokens; with it steps
    of equal size get the rates of a run that is measured in steps.
    """
    schedule = config.schedule
    if config.steps is not None:
        position, size, warmup, total = step, 1, schedule.warmup_steps, config.steps
    else:
        assert config.tokens is not None
        position, size, warmup, total = tokens, step_tokens, schedule.warmup_tokens, config.tokens
    if position < warmup:
        return min(1.0, (position + size) / warmup)
    if schedule.kind == "constant":
        return 1.0
    last = max(1, total - size)  # the position at which the last step begins
    length = max(1, last - warmup)
    shape = _shape(schedule, min(1.0, (position - warmup) / length), decay=schedule.decay_fraction * last / length)
    return schedule.final_fraction + (1 - schedule.final_fraction) * shape


def _shape(schedule: ScheduleConfig, done: float, *, decay: float) -> float:
    """From 1 to 0 while `done` goes from 0 to 1; wsd goes down in the last `decay` of that."""
    if schedule.kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule.kind == "linear" else min(1.0, (1 - done) / min(1.0, decay))


def _groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Trained parameters by what they are; a group that would be empty is left out."""
    alphas = {id(p) for block in control_blocks(model) for p in block.interpolation.parameters()}
    members: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "alphas": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in alphas or name.endswith("relaxation_logit"):
            members["alphas"].append(parameter)
        elif len(shape(parameter)) < 2 or name.endswith("bias"):  # the biases of experts are one matrix
            members["vectors"].append(parameter)
        else:
            members["matrices"].append(parameter)
    peaks = {"alphas": config.optimizer.alpha_lr or config.lr}
    decays = {"matrices": config.optimizer.weight_decay}
    return [
        {"name": name, "params": found, "weight_decay": decays.get(name, 0.0)}
        | {key: peaks.get(name, config.lr) for key in ("peak", "lr")}
        for name, found in members.items()
        if found
    ]
