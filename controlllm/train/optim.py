"""Optimizer and learning rate."""

import math

import torch
from torch import nn

from controlllm.config import OptimizerConfig, ScheduleConfig, TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over what is trained; weight decay on matrices only."""
    optimizer: OptimizerConfig = config.optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (optimizer.beta1, optimizer.beta2)
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=betas, eps=optimizer.eps, fused=True
    )


def learning_rate(step: int, *, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then constant, linear or cosine to the final fraction."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    done = (step - schedule.warmup_steps) / max(1, steps - 1 - schedule.warmup_steps)
    shape = 1 - done if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * shape)
