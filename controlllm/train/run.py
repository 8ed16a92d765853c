"""A training run but for its steps: what goes on before, between and after them is the same for every trainer."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlllm.config import ControlConfig, TrainConfig
from controlllm.control.expand import control_blocks
from controlllm.control.schedule import set_step
from controlllm.data.loader import Batch, Mix
from controlllm.progress import console, track
from controlllm.train.attention import refuse_leaks
from controlllm.train.best import Best
from controlllm.train.checkpoint import Checkpoints
from controlllm.train.curves import RunFacts
from controlllm.train.debugging import post_mortem, stop_before_first_step
from controlllm.train.flops import peak_flops
from controlllm.train.guards import FiniteGuard, step_samples
from controlllm.train.length import Length
from controlllm.train.loss_scale import LossScale
from controlllm.train.metrics import Metrics, StepRecord
from controlllm.train.optim import set_rates
from controlllm.train.parallel import Parallel
from controlllm.train.precision import autocast
from controlllm.train.profiling import profile
from controlllm.train.samples import show_validation
from controlllm.train.share import Share
from controlllm.train.stopping import Stopped, StopRequest
from controlllm.train.validate import Validation
from controlllm.train.watchdog import Watchdog

Show = Callable[[StepRecord], None]


@dataclass
class Step:
    """An optimizer step that has begun. Counts are of the global batch."""

    began: float
    waited: float
    """Seconds for its data."""
    micro_batches: list[Batch]
    """Of this process."""
    targets: float
    tokens: float
    flops: float
    rate: float = 0.0
    """Learning rate."""


class TrainingRun(ABC):
    """What must survive a restart is in the checkpoint, all else follows from the step.

    A trainer sets `optimizer`, calls `_start` and, for each step, `_begin_step`, its own passes, `_sum`,
    `_may_apply`, `_end_step` and `_after_step`. Every process of a run makes one and calls `train`.
    """

    optimizer: Any
    """torch's, or one that stands for an engine's: it has `param_groups`, and `Checkpoints` can save it."""
    metrics: Metrics | None = None
    validation: Validation | None = None
    best: Best | None = None

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
        validation: Callable[[], Validation] | None = None,
    ):
        """validation: makes it when the model is in its place, and still its base."""
        self.parallel, self.model, self.world = parallel, parallel.model, parallel.world
        self.mix, self.config, self.control, self.folder, self.run = mix, config, control, folder, run
        self.checkpoints, self._make_validation = checkpoints, validation
        self.share = Share(mix, config, self.world)
        self.scale = LossScale(config)
        self.guard = FiniteGuard(config.guards.max_skipped, announce=self.world.is_main)
        self.watchdog, self.stop = Watchdog(self.world, seconds=config.guards.hang_seconds), StopRequest()
        self.has_divergence = any(block.divergence_name != "none" for block in control_blocks(self.model))
        self.length = Length(config)
        self.step = self.tokens = 0
        self.validated = -1  # the step of the last validation
        self.resumed: list[int] = []  # the steps after which an earlier process's run was taken up

    @abstractmethod
    def train(self, *, debug: int | None = None) -> None:
        """All steps that are left. Raises Stopped, with everything saved, after a SIGTERM or SIGINT.

        debug: the process that stops in pdb before the first step; no process is watched then.
        """

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.passed == self.length.total or (self.best is not None and self.best.exhausted)

    @property
    def passed(self) -> int:
        """Steps or tokens that are behind."""
        return self.length.passed(self.step, self.tokens)

    def _start(self) -> None:
        """The model is spread: try it, and go on from the newest checkpoint if there is one."""
        self._refuse_leaks()
        if self._make_validation:
            self.validation = self._make_validation()
            self.validation.passes.beat = lambda: self._phase("validate")
            self.best = Best(self.validation.config.best) if self.validation.config.best else None
        self.parallel.settle()
        saved = self._restore()
        peak = peak_flops(self.world.device, self.config.precision, self.config.metrics)
        self.metrics = Metrics(
            self.folder, self.config.metrics, world=self.world, run=self.run, model=self.model, peak=peak,
            step=self.step, state=saved,
        )  # fmt: skip

    def _refuse_leaks(self) -> None:
        of = self.model.config
        with autocast(self.config, self.world.device):
            refuse_leaks(
                self.parallel, attention=of._attn_implementation, vocabulary=of.vocab_size, device=self.world.device
            )

    def _before_steps(self, debug: int | None) -> None:
        if self._owes_validation() and self._validate():  # of step 0, or of the step at which it was stopped
            self._save(best=True)
        if debug is not None:
            stop_before_first_step(self.world, debug)

    def _begin_step(self) -> Step:
        """The step's rows, its place in the schedules and its learning rate."""
        began = time.monotonic()
        self._phase("data")
        micro_batches = self.share.of(self.step)
        waited = time.monotonic() - began
        targets, tokens, flops = self._sum([[b.targets, b.tokens, self.parallel.flops(b)] for b in micro_batches])
        if self.control:
            set_step(self.model, self.control, step=self.step, done=self.length.before(self.step, self.tokens, tokens))
        rate = set_rates(self.optimizer, self.config, step=self.step, tokens=self.tokens, step_tokens=int(tokens))
        return Step(began, waited, micro_batches, targets, tokens, flops, rate)

    def _sum(self, values: Sequence[Any]) -> list[float]:
        """Of this process's micro-batches, and over the processes."""
        rows = [torch.as_tensor(row, dtype=torch.float64, device=self.world.device) for row in values]
        return self.world.sum(torch.stack(rows).sum(0)).tolist()

    def _may_apply(self, loss: float, norm: float, losses: list[Tensor]) -> bool:
        finite = math.isfinite(norm)
        if self.scale.update(finite) and math.isfinite(loss):
            return False  # the loss scale was too large, which is no fault of the run

        def samples() -> list[str]:
            each = [loss[0].item() for loss in losses]
            return step_samples(self.mix, self.share.places(self.step), each, world=self.world)

        return self.guard.check(self.step + 1, loss=loss, grad_norm=norm, samples=samples)

    def _end_step(self, step: Step, totals: Sequence[float], norm: float, *, applied: bool) -> tuple[StepRecord, bool]:
        """Its record, and whether any process was asked to stop. totals: loss, cross-entropy and divergence."""
        stop, failed = self._sum([[self.stop.signal is not None, self.checkpoints.failed()]])
        self.step, self.tokens = self.step + 1, self.tokens + int(step.tokens)
        if failed:
            self.checkpoints.wait()  # raises on every process what went wrong on one
        loss, entropy, divergence = totals
        record = StepRecord(
            step=self.step, lr=step.rate, loss=loss, cross_entropy=entropy,
            divergence=divergence if self.has_divergence else None, grad_norm=norm, tokens=int(step.tokens),
            targets=int(step.targets), seconds=time.monotonic() - step.began, data_seconds=step.waited,
            flops=step.flops or None, skipped=not applied,
        )  # fmt: skip
        return record, bool(stop)

    def _after_step(self, show: Show, record: StepRecord, stopping: bool) -> None:
        """Write it down, validate and save when that is due. Raises Stopped."""
        show(record)
        if stopping and not self.finished:
            self._save(wait=True)
            raise Stopped(self.stop.signal or "SIGTERM", self.step)
        improved = self._owes_validation() and self._validate()
        if improved or self._is_due(self.config.checkpoint.every):
            self._save(best=improved)

    def _after_steps(self) -> None:
        if self.best and self.best.config.use == "best":
            self._phase("restore")
            self.checkpoints.wait()
            self.checkpoints.restore_best(self.model, self.optimizer)

    def _owes_validation(self) -> bool:
        if self.validation is None or self.validated == self.step:
            return False
        return self._is_due(self.validation.config.every)

    def _validate(self) -> bool:
        """Whether this was the best so far; the untrained model's does not count."""
        assert self.validation
        assert self.metrics
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
        assert self.metrics is not None
        self._phase("save")
        state: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "validated": self.validated}
        state["resumed"] = self.resumed
        state["metrics"] = self.metrics.state()
        state |= {name: part.state() for name, part in self._stateful()}
        self.checkpoints.save(self.model, self.optimizer, state, best=best, wait=wait)

    def _restore(self) -> dict[str, Any] | None:
        """The metrics' state of the newest checkpoint, after everything else went on from it."""
        state = self.checkpoints.restore(self.model, self.optimizer)
        if state is None:
            return None
        self.step, self.tokens, self.validated = state["step"], state["tokens"], state["validated"]
        self.resumed = [*state.get("resumed", []), self.step]  # checkpoints of earlier versions do not say
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
    def _surroundings(self, debug: int | None) -> Iterator[Show]:
        """What goes on around the steps: watching, listening to signals, profiling; and a way to show a step."""
        metrics = self.metrics
        assert metrics is not None
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
                    metrics.step(record)
                    advance(self.passed, metrics.note)
                    mark(record.flops and record.flops / self.world.size)

                with nullcontext() if debug is None else post_mortem(self.world, debug):
                    yield show
                self._phase("save")
                self.checkpoints.wait()
            finished = True
        finally:
            metrics.close(finished=finished)
