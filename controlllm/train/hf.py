"""transformers' Trainer as the loop: its passes, clipping and optimizer step, between our data and our records."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from controlllm.config import DeepSpeed
from controlllm.train.fsdp1 import FSDP1State
from controlllm.train.native import loss_parts
from controlllm.train.optim import make_optimizer
from controlllm.train.precision import autocast
from controlllm.train.run import Show, Step, TrainingRun
from controlllm.train.share import seed_place
from controlllm.train.zero import ZeroState, leave_deepspeed, start_deepspeed
from controlllm.train.zero_config import zero_config


class HFTrainer(TrainingRun):
    """The run that `train.trainer: transformers` asks for. Raises what the native one raises, at the same places."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.begun: Step | None = None
        self.losses: list[Tensor] = []
        self.norm = math.nan
        self.trainer = _Trainer(self, _arguments(self))

    def train(self, *, debug: int | None = None) -> None:
        with ExitStack() as stack:
            if isinstance(self.config.parallel, DeepSpeed):
                stack.callback(leave_deepspeed)
            callback = _Callback(self, stack, debug)
            self.trainer.add_callback(callback)
            self.trainer.train()
            self._after_steps()

    def micro_batches(self) -> Iterator[dict[str, Any]]:
        """Those of every step that is left, as the model's arguments; a step begins with its first one."""
        while not self.finished:
            self.begun = step = self._begin_step()
            self.losses = []
            counts = {"num_items_in_batch": step.targets, "num_tokens_in_batch": step.tokens}
            for batch in step.micro_batches:
                yield self.parallel.arguments(batch) | counts

    def loss(self, inputs: dict[str, Any]) -> Tensor:
        """Of one micro-batch, scaled for its backward pass."""
        place = len(self.losses) * self.world.size + self.world.rank
        seed_place(self.config.seed, self.step, place)
        self._phase("forward")
        with autocast(self.config, self.world.device):
            out = self.parallel(**inputs)
        self.losses.append(loss_parts(out))
        self._phase("backward")
        loss = out.loss * self.parallel.gradient_factor
        if isinstance(self.optimizer, ZeroState) and self.scale.enabled:
            self.optimizer.scale_losses(self.scale.value)
            return loss
        return self.scale.scale(loss)

    def close_step(self) -> None:
        """Gradients are whole and clipped: take them back where one of them, or a loss, is no number."""
        self._phase("optimizer")
        self.totals = self._sum(self.losses)
        self.applied = self._may_apply(self.totals[0], self.norm, self.losses)
        if not self.applied:
            self.optimizer.zero_grad(set_to_none=True)

    def end_step(self, show: Show) -> None:
        assert self.begun
        self._after_step(show, *self._end_step(self.begun, self.totals, self.norm, applied=self.applied))


class _Trainer(Trainer):
    """Asks the run for what transformers would make itself: batches, loss and optimizer."""

    def __init__(self, run: HFTrainer, arguments: TrainingArguments):
        self.run = run
        super().__init__(run.model, arguments)
        # `parallelize` has sharded it: as one that transformers sharded while loading, it must not be wrapped again.
        self.is_distributed_loading_by_transformers = run.parallel.is_sharded
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True

    def get_train_dataloader(self) -> Any:
        return self.run.micro_batches()

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, None  # the counts are in the batches

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            zero = isinstance(self.run.config.parallel, DeepSpeed)  # which keeps its state in buffers of its own
            self.optimizer = self.run.optimizer = make_optimizer(self.run.model, self.run.config, with_state=not zero)
        return self.optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        last = len(self.run.losses) == self.run.share.rounds - 1
        with self.run.parallel.synchronised(last):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        return self.run.loss(inputs)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Nothing: all that is trained was sharded, and the older FSDP's shards are plain tensors that differ."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # ours are exact, and counted where the batch is made

    def _clip_grad_norm(self, model: Any) -> Any:
        run = self.run
        run._phase("gradients")
        run.scale.unscale(p for p in run.model.parameters() if p.requires_grad)
        sharded = run.parallel.module
        if isinstance(sharded, FullyShardedDataParallel):
            norm = sharded.clip_grad_norm_(run.config.optimizer.max_grad_norm)
        else:
            norm = super()._clip_grad_norm(model)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        run.norm = float(whole)  # type: ignore[arg-type]
        return whole


class _Callback(TrainerCallback):
    """What goes on around and between the steps; the Trainer's own saving, evaluation and logging are off."""

    def __init__(self, run: HFTrainer, stack: ExitStack, debug: int | None):
        self.run, self.stack, self.debug = run, stack, debug

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        run = self.run
        if not run.parallel.is_sharded:
            run.parallel.module = cast(nn.Module, run.trainer.model_wrapped)
        if isinstance(run.config.parallel, DeepSpeed):
            run.optimizer = ZeroState(run.trainer.model_wrapped)
        elif isinstance(run.parallel.module, FullyShardedDataParallel):
            run.optimizer = FSDP1State(run.optimizer)
        run._start()
        self.show = self.stack.enter_context(run._surroundings(self.debug))
        run._before_steps(self.debug)
        state.global_step = run.step
        control.should_training_stop = run.finished

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.run.close_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.end_step(self.show)
        control.should_training_stop = self.run.finished


class _Arguments(TrainingArguments):
    @property
    def place_model_on_device(self) -> bool:
        return False  # `parallelize` did, or who shards it does


def _arguments(run: HFTrainer) -> TrainingArguments:
    """Ours as the Trainer's. Precision, data order, schedule, saving and logging are the run's own business."""
    config = run.config
    more: dict[str, Any] = {}
    if isinstance(config.parallel, DeepSpeed):
        start_deepspeed()
        more["deepspeed"] = zero_config(config, processes=run.world.size)
    return _Arguments(
        output_dir=str(run.folder),
        max_steps=config.steps or 10**9,  # a run in tokens stops itself
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=run.share.rounds,
        learning_rate=config.lr,
        lr_scheduler_type="constant",
        max_grad_norm=config.optimizer.max_grad_norm,
        seed=config.seed,
        use_cpu=run.world.device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        **more,
    )
