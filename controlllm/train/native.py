"""The training loop: one process per device, gradients summed, loss weighted by target tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from controlllm.data.loader import Batch
from controlllm.train.metrics import StepRecord
from controlllm.train.optim import make_optimizer
from controlllm.train.precision import autocast
from controlllm.train.run import Step, TrainingRun
from controlllm.train.share import seed_place


class Trainer(TrainingRun):
    """Trains a model on `mix`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.model, self.config)
        self._start()

    def train(self, *, debug: int | None = None) -> None:
        with self._surroundings(debug) as show:
            self._before_steps(debug)
            while not self.finished:
                self._after_step(show, *self.train_step())
            self._after_steps()

    def train_step(self) -> tuple[StepRecord, bool]:
        """One optimizer step over the global batch, applied by all processes or, if it is not finite anywhere, by none.

        Gives its record, and whether any process was asked to stop.
        """
        step = self._begin_step()
        losses = [self._forward_backward(k, batch, step) for k, batch in enumerate(step.micro_batches)]
        self._phase("gradients")
        totals = self._sum(losses)
        norm = self._clip()
        self._phase("optimizer")
        if applied := self._may_apply(totals[0], norm, losses):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._end_step(step, totals, norm, applied=applied)

    def _forward_backward(self, number: int, batch: Batch, step: Step) -> Tensor:
        """Add a micro-batch's gradients; its share of (loss, cross-entropy, divergence)."""
        seed_place(self.config.seed, self.step, number * self.world.size + self.world.rank)
        with self.parallel.synchronised(number == self.share.rounds - 1):
            self._phase("forward")
            with autocast(self.config, self.world.device):
                out = self.parallel(
                    **self.parallel.arguments(batch), num_items_in_batch=step.targets, num_tokens_in_batch=step.tokens
                )
            self._phase("backward")
            self.scale.scale(out.loss * self.parallel.gradient_factor).backward()
        return loss_parts(out)

    def _clip(self) -> float:
        """The norm of the whole gradient, over all that is trained and all processes, before it is scaled down."""
        self.scale.unscale(self.trained)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.max_grad_norm)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def loss_parts(out: Any) -> Tensor:
    """A micro-batch's share of (loss, cross-entropy, divergence), (3,)."""
    divergence = torch.zeros_like(out.cross_entropy) if out.divergence is None else out.divergence
    return torch.stack([out.loss.detach(), out.cross_entropy, divergence])
