"""The training loop: one process per device, gradients summed, loss weighted by target tokens."""

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlllm.config import ControlConfig, TrainConfig, ValidationConfig
from controlllm.control.expand import control_blocks
from controlllm.control.loss import forward_with_loss
from controlllm.control.schedule import set_step
from controlllm.data.loader import Batch, Mix, batches
from controlllm.data.shelf import PackedRow
from controlllm.errors import UserError
from controlllm.progress import track
from controlllm.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from controlllm.train.distributed import World
from controlllm.train.optim import learning_rate, make_optimizer


@dataclass(frozen=True)
class StepResult:
    """Sums over the global batch, already divided: losses per target token."""

    loss: float
    cross_entropy: float
    divergence: float | None
    grad_norm: float
    tokens: int
    targets: int


class WithLoss(torch.nn.Module):
    """A model whose forward pass gives the loss, expanded or not: what DDP has to wrap."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        return forward_with_loss(self.model, **batch)


class Trainer:
    """Trains `model` on `mix`; everything that must survive a restart is in the checkpoint and the step number."""

    def __init__(
        self,
        model: Any,
        mix: Mix,
        config: TrainConfig,
        *,
        world: World,
        folder: Path,
        control: ControlConfig | None = None,
    ):
        if config.global_batch_size % world.size:
            raise UserError(
                f"train.global_batch_size {config.global_batch_size} cannot be shared equally by {world.size} processes"
            )
        self.model, self.mix, self.config, self.world, self.folder = model.to(world.device), mix, config, world, folder
        self.control = control
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, config)
        self.parallel = self._parallelize()
        self.step = 0
        self.has_divergence = any(block.divergence_name != "none" for block in control_blocks(model))

    def _parallelize(self) -> Any:
        if self.config.activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.world.size == 1:
            return WithLoss(self.model)
        return torch.nn.parallel.DistributedDataParallel(WithLoss(self.model), gradient_as_bucket_view=True)

    def train(self, every: ValidationConfig | None = None) -> None:
        """All steps that are left; logs to `metrics.jsonl`, validates and saves when due."""
        checkpoints = self.folder / "checkpoints"
        if (saved := self.world.share(newest_checkpoint(checkpoints) if self.world.is_main else None)) is not None:
            self.step = load_checkpoint(saved, self.model, self.optimizer)
        log = MetricsLog(self.folder / "metrics.jsonl", self.step) if self.world.is_main else None
        held_back = self.mix.validation(every.rows) if every else []
        if held_back and self.step == 0:
            self._validate(held_back, log)
        with track("train", total=self.config.steps, start=self.step) as advance:
            while self.step < self.config.steps:
                began = time.monotonic()
                result = self.train_step()
                self.step += 1
                if log:
                    seconds = time.monotonic() - began
                    log.write(
                        {"step": self.step, "lr": self._lr(self.step - 1), "seconds": round(seconds, 4), **vars(result)}
                    )
                    advance(self.step, f"loss {result.cross_entropy:.3f} · {result.tokens / seconds:,.0f} tok/s")
                last = self.step == self.config.steps
                if held_back and every and (last or self.step % every.every == 0):
                    self._validate(held_back, log)
                if self.world.is_main and not last and self.step % self.config.checkpoint.every == 0:
                    save_checkpoint(
                        checkpoints, self.step, self.model, self.optimizer, keep=self.config.checkpoint.keep
                    )

    def train_step(self) -> StepResult:
        """One optimizer step over the global batch."""
        if self.control:
            set_step(self.model, self.control, step=self.step, steps=self.config.steps)
        micro_batches = self._micro_batches()
        counts = torch.tensor([[b.targets, b.tokens] for b in micro_batches]).sum(0).to(self.world.device)
        targets, tokens = self.world.sum(counts).tolist()
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with self._sync(last), self._autocast():
                out = self.parallel(**self._arguments(batch), num_items_in_batch=targets, num_tokens_in_batch=tokens)
                (out.loss * self.world.size).backward()  # DDP averages over the processes; we want the sum
            sums += torch.stack([out.loss.detach(), *_parts(out)]).double()
        loss, entropy, divergence = self.world.sum(sums).tolist()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.max_grad_norm).item()
        self._refuse_non_finite(loss, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, entropy, divergence if self.has_divergence else None, norm, tokens, targets)

    def _micro_batches(self) -> list[Batch]:
        return self.mix.step(
            self.step,
            global_batch=self.config.global_batch_size,
            micro_batch=self.config.micro_batch_size,
            rank=self.world.rank,
            world=self.world.size,
        )

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        return {name: value.to(self.world.device, non_blocking=True) for name, value in batch.arguments().items()}

    def _sync(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last or self.world.size == 1 else self.parallel.no_sync()

    def _autocast(self) -> AbstractContextManager[Any]:
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=bf16)

    def _lr(self, step: int) -> float:
        return learning_rate(step, steps=self.config.steps, peak=self.config.lr, schedule=self.config.schedule)

    def _refuse_non_finite(self, loss: float, norm: float) -> None:
        if not (abs(loss) < float("inf") and norm < float("inf")):
            raise UserError(
                f"train: loss {loss} and gradient norm {norm} at step {self.step + 1} are not finite; the step was not "
                f"applied. Lower train.lr ({self.config.lr}) or look at the rows of this step"
            )

    @torch.no_grad()
    def _validate(self, rows: list[PackedRow], log: "MetricsLog | None") -> None:
        """Mean loss per target over the validation rows; every process sees all of them, which keeps them in step."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64)
        targets = 0
        for batch in batches(rows, size=self.config.micro_batch_size):
            with self._autocast():
                out: Any = forward_with_loss(
                    self.model, **self._arguments(batch), num_items_in_batch=1, measure_divergence=False
                )
            total += out.cross_entropy.double().cpu()
            targets += batch.targets
        self.model.train()
        if log:
            log.write({"step": self.step, "validation_loss": total.item() / max(targets, 1)})


def _parts(out: Any) -> Iterator[Tensor]:
    yield out.cross_entropy
    yield out.divergence if out.divergence is not None else torch.zeros_like(out.cross_entropy)


class MetricsLog:
    """One JSON line per event; a resumed run drops the lines after its checkpoint and goes on."""

    def __init__(self, file: Path, step: int):
        kept = [line for line in _lines(file) if json.loads(line)["step"] <= step] if step else []
        file.write_text("".join(line + "\n" for line in kept))
        self.file = file

    def write(self, row: dict[str, Any]) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")


def _lines(file: Path) -> list[str]:
    """Complete lines only: the last one may have been cut off by a kill."""
    return file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
