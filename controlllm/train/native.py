"""The training loop: one process per device, gradients summed, loss weighted by target tokens."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from controlllm.config import ControlConfig, TrainConfig
from controlllm.control.expand import control_blocks
from controlllm.control.schedule import set_step
from controlllm.data.loader import Batch, Mix
from controlllm.progress import console, track
from controlllm.train.best import Best
from controlllm.train.checkpoint import Checkpoints
from controlllm.train.curves import RunFacts
from controlllm.train.debugging import post_mortem, stop_before_first_step
from controlllm.train.flops import peak_flops
from controlllm.train.guards import FiniteGuard, step_samples
from controlllm.train.length import Length
from controlllm.train.loss_scale import LossScale
from controlllm.train.metrics import Metrics, StepRecord
from controlllm.train.optim import make_optimizer, set_rates
from controlllm.train.parallel import Parallel
from controlllm.train.precision import autocast
from controlllm.train.profiling import profile
from controlllm.train.samples import show_validation
from controlllm.train.share import Share, seed_place
from controlllm.train.stopping import Stopped, StopRequest
from controlllm.train.validate import Validation
from controlllm.train.watchdog import Watchdog


class Trainer:
    """Trains a model on `mix`; what must survive a restart is in the checkpoint, all else follows from the step.

    Every process of a run makes one and calls `train`.
    """

    def __init__(
        self,
        parallel: Parallel,
        mix: Mix,
        config: TrainConfig,
        *,
        folder: Path,
        checkpoints: Checkpoints,
        run: RunFacts,
        control: ControlConfig | None = None,
        validation: Validation | None = None,
    ):
        parallel.settle()
        self.parallel, self.model, self.world = parallel, parallel.model, parallel.world
        self.mix, self.config, self.control, self.folder = mix, config, control, folder
        self.checkpoints, self.validation = checkpoints, validation
        self.share = Share(mix, config, self.world)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.model, config)
        self.scale = LossScale(config)
        self.guard = FiniteGuard(config.guards.max_skipped, announce=self.world.is_main)
        self.best = Best(validation.config.best) if validation and validation.config.best else None
        self.watchdog, self.stop = Watchdog(self.world, seconds=config.guards.hang_seconds), StopRequest()
        self.has_divergence = any(block.divergence_name != "none" for block in control_blocks(self.model))
        if validation:
            validation.passes.beat = lambda: self._phase("validate")
        self.length = Length(config)
        self.step = self.tokens = 0
        self.validated = -1  # the step of the last validation
        saved = self._restore()
        peak = peak_flops(self.world.device, config.precision, config.metrics)
        self.metrics = Metrics(
            folder, config.metrics, world=self.world, run=run, model=self.model, peak=peak, step=self.step, state=saved
        )

    def train(self, *, debug: int | None = None) -> None:
        """All steps that are left. Raises Stopped, with everything saved, after a SIGTERM or SIGINT.

        debug: the process that stops in pdb before the first step; no process is watched then.
        """
        with self._surroundings(debug) as show:
            if self._owes_validation() and self._validate():  # of step 0, or of the step at which it was stopped
                self._save(best=True)
            if debug is not None:
                stop_before_first_step(self.world, debug)
            while not self.finished:
                record, stopping = self.train_step()
                show(record)
                if stopping and not self.finished:
                    self._save(wait=True)
                    raise Stopped(self.stop.signal or "SIGTERM", self.step)
                improved = self._owes_validation() and self._validate()
                if improved or self._is_due(self.config.checkpoint.every):
                    self._save(best=improved)
            if self.best and self.best.config.use == "best":
                self._phase("restore")
                self.checkpoints.wait()
                self.checkpoints.restore_best(self.model)

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.passed == self.length.total or (self.best is not None and self.best.exhausted)

    @property
    def passed(self) -> int:
        """Steps or tokens that are behind."""
        return self.length.passed(self.step, self.tokens)

    def train_step(self) -> tuple[StepRecord, bool]:
        """One optimizer step over the global batch, applied by all processes or, if it is not finite anywhere, by none.

        Gives its record, and whether any process was asked to stop.
        """
        began = time.monotonic()
        self._phase("data")
        micro_batches = self.share.of(self.step)
        waited = time.monotonic() - began
        targets, tokens, flops = self._sum([[b.targets, b.tokens, self.parallel.flops(b)] for b in micro_batches])
        if self.control:
            set_step(self.model, self.control, step=self.step, done=self.length.before(self.step, self.tokens, tokens))
        losses = [self._forward_backward(k, batch, targets, tokens) for k, batch in enumerate(micro_batches)]
        self._phase("gradients")
        loss, entropy, divergence = self._sum(losses)
        stop, failed = self._sum([[self.stop.signal is not None, self.checkpoints.failed()]])
        norm = self._clip()
        rate = set_rates(self.optimizer, self.config, step=self.step, tokens=self.tokens, step_tokens=int(tokens))
        self._phase("optimizer")
        if applied := self._may_apply(loss, norm, losses):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.tokens = self.step + 1, self.tokens + int(tokens)
        if failed:
            self.checkpoints.wait()  # raises on every process what went wrong on one
        record = StepRecord(
            step=self.step, lr=rate, loss=loss, cross_entropy=entropy,
            divergence=divergence if self.has_divergence else None, grad_norm=norm, tokens=int(tokens),
            targets=int(targets), seconds=time.monotonic() - began, data_seconds=waited, flops=flops or None,
            skipped=not applied,
        )  # fmt: skip
        return record, bool(stop)

    def _forward_backward(self, number: int, batch: Batch, targets: float, tokens: float) -> Tensor:
        """Add a micro-batch's gradients; its share of (loss, cross-entropy, divergence)."""
        seed_place(self.config.seed, self.step, number * self.world.size + self.world.rank)
        with self.parallel.synchronised(number == self.share.rounds - 1):
            self._phase("forward")
            with autocast(self.config, self.world.device):
                out = self.parallel(
                    **self.parallel.arguments(batch), num_items_in_batch=targets, num_tokens_in_batch=tokens
                )
            self._phase("backward")
            self.scale.scale(out.loss * self.parallel.gradient_factor).backward()
        divergence = torch.zeros_like(out.cross_entropy) if out.divergence is None else out.divergence
        return torch.stack([out.loss.detach(), out.cross_entropy, divergence])

    def _sum(self, values: Sequence[Any]) -> list[float]:
        """Of this process's micro-batches, and over the processes."""
        rows = [torch.as_tensor(row, dtype=torch.float64, device=self.world.device) for row in values]
        return self.world.sum(torch.stack(rows).sum(0)).tolist()

    def _clip(self) -> float:
        """The norm of the whole gradient, over all that is trained and all processes, before it is scaled down."""
        self.scale.unscale(self.trained)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.max_grad_norm)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def _may_apply(self, loss: float, norm: float, losses: list[Tensor]) -> bool:
        finite = math.isfinite(norm)
        if self.scale.update(finite) and math.isfinite(loss):
            return False  # the loss scale was too large, which is no fault of the run

        def samples() -> list[str]:
            each = [loss[0].item() for loss in losses]
            return step_samples(self.mix, self.share.places(self.step), each, world=self.world)

        return self.guard.check(self.step + 1, loss=loss, grad_norm=norm, samples=samples)

    def _owes_validation(self) -> bool:
        if self.validation is None or self.validated == self.step:
            return False
        return self._is_due(self.validation.config.every)

    def _validate(self) -> bool:
        """Whether this was the best so far; the untrained model's does not count."""
        assert self.validation is not None
        self._phase("validate")
        self.validated = self.step
        measured = self.validation.run()
        self.parallel.settle()
        self.metrics.event(self.step, measured)
        if self.best:
            self.best.require(measured)  # the untrained model's validation has told it, before any step
        improved = self.best is not None and self.step > 0 and self.best.update(self.step, measured)
        if self.world.is_main:
            show_validation(self.folder, self.step, measured, samples=self.validation.samples(), best=improved)
        return improved

    def _save(self, *, best: bool = False, wait: bool = False) -> None:
        self._phase("save")
        state: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "validated": self.validated}
        state["metrics"] = self.metrics.state()
        state |= {name: part.state() for name, part in self._stateful()}
        self.checkpoints.save(self.model, self.optimizer, state, best=best, wait=wait)

    def _restore(self) -> dict[str, Any] | None:
        """Go on from the newest checkpoint, if there is one; gives the metrics' state."""
        state = self.checkpoints.restore(self.model, self.optimizer)
        if state is None:
            return None
        self.step, self.tokens, self.validated = state["step"], state["tokens"], state["validated"]
        for name, part in self._stateful():
            part.load(state[name])
        if self.world.is_main:
            console.print(f"  going on after step {self.step:,}", markup=False)
        return state["metrics"]

    def _stateful(self) -> list[tuple[str, Any]]:
        parts: dict[str, Any] = {"guard": self.guard, "loss_scale": self.scale, "best": self.best}
        return [(name, part) for name, part in parts.items() if part is not None]

    def _is_due(self, every: int) -> bool:
        return self.finished or self.step % every == 0

    def _phase(self, name: str) -> None:
        self.watchdog.phase(name, self.step + 1)

    @contextmanager
    def _surroundings(self, debug: int | None) -> Iterator[Callable[[StepRecord], None]]:
        """What goes on around the steps: watching, listening to signals, profiling; and a way to show a step."""
        if debug is not None:
            self.watchdog.seconds = math.inf
        bar: Any = nullcontext(lambda *_: None)
        if self.world.is_main:
            bar = track("train", total=self.length.total, start=self.passed)
        finished = False
        try:
            with (
                self.watchdog,
                self.stop,
                bar as advance,
                profile(self.config.profile, self.folder, self.world) as mark,
            ):

                def show(record: StepRecord) -> None:
                    self.metrics.step(record)
                    advance(self.passed, self.metrics.note)
                    mark(record.flops and record.flops / self.world.size)

                with nullcontext() if debug is None else post_mortem(self.world, debug):
                    yield show
                self._phase("save")
                self.checkpoints.wait()
            finished = True
        finally:
            self.metrics.close(finished=finished)
