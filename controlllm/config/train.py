"""How it is trained. The numbers come out the same whatever the processes, their way of sharing and their memory."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from controlllm.config.base import Config, Count, Number, Positive, no_flag


class OptimizerConfig(Config):
    """AdamW and the clipping of gradients."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps its state in 8 bits."""
    beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Decay of the mean of gradients."""
    beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.95
    """Decay of the mean of squared gradients."""
    eps: Annotated[Number, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Applied to matrices only: not to norms, biases and alphas."""
    alpha_lr: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Peak learning rate of the alphas (all that belongs to an interpolation); `train.lr` when left out."""
    max_grad_norm: Annotated[Number, Field(gt=0)] = 1.0
    """Gradients with a larger norm, over all that is trained and all processes, are scaled down to it."""


class ScheduleConfig(Config):
    """The learning rate over the run."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; wsd stays at the peak and goes down linearly in the last `decay_fraction`."""
    warmup_steps: Count = 0
    """Steps of linear rise to the peak."""
    warmup_tokens: Count = 0
    """The same in tokens, for a run that is measured in `train.tokens`."""
    decay_fraction: Annotated[Number, Field(gt=0, le=1)] = 0.1
    """Share of the run in which wsd goes down."""
    final_fraction: Annotated[Number, Field(ge=0, le=1)] = 0.1
    """Learning rate at the end, as a fraction of the peak."""


class CheckpointConfig(Config):
    """What a run that was stopped goes on from: the same command finds the newest checkpoint that is whole."""

    every: Positive = 500
    """Steps between checkpoints."""
    keep: Positive = 2
    """Newest checkpoints that are kept."""
    keep_every: Positive | None = None
    """Checkpoints at multiples of this step are kept, too, for good."""
    folder: str | None = None
    """A folder that all nodes share, or `s3://`, `gs://`, `hdfs://`; beside the run's other files when left out."""
    asynchronous: bool = True
    """Write while training goes on; only copying the tensors holds it up."""


class GuardsConfig(Config):
    """When a run ends itself instead of going wrong or waiting for ever."""

    max_skipped: Count = 3
    """Steps in a row that may be left out because their loss or gradient is not finite."""
    hang_seconds: Positive = 900
    """A process that is in one phase (data, forward, save, ...) for longer ends the run, with the stacks of all."""


class MetricsConfig(Config):
    """What is written down while training; `metrics.jsonl` always."""

    every: Positive = 1
    """Steps that one line is the mean of."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Where else they go."""
    project: Annotated[str, Field(min_length=1)] = "controlllm"
    """What the trackers file the run under."""
    peak_tflops: Annotated[Number, Field(gt=0)] | None = None
    """Of one device, in the training precision, for the utilisation (MFU); known for common GPUs."""


class ProfileConfig(Config):
    """A trace of a few steps of one process, for chrome://tracing or Perfetto."""

    wait: Count = 5
    """Steps before anything is recorded."""
    warmup: Count = 2
    """Steps that are recorded and thrown away."""
    active: Positive = 3
    """Steps that are kept."""
    rank: Count = 0
    """The process that is traced."""
    stacks: bool = False
    """Where in the code each operation was called."""
    memory: bool = False
    """Every allocation of these steps; on a GPU a snapshot for pytorch.org/memory_viz, too."""
    flops: bool = False
    """Count one step's floating-point operations by module; that step runs without compilation."""


class DDP(Config):
    """Every process holds the whole model; gradients are summed."""

    kind: Literal["ddp"] = "ddp"
    """Replicate."""


class FSDP(Config):
    """Parameters, gradients and optimizer state are sharded over the processes."""

    kind: Literal["fsdp"] = "fsdp"
    """Shard with torch's `fully_shard`."""
    replicas: Positive | None = None
    """More than one is HSDP: shard within a replica, sum between replicas. By default as many as `shards` leaves."""
    shards: Positive | None = None
    """Processes a replica is sharded over, such as those of a node; by default the launcher's number / replicas."""
    frozen: Literal["shard", "replicate"] = "shard"
    """replicate keeps the frozen weights whole in every process: more memory, far less traffic."""
    reshard_after_forward: bool = True
    """Free a block's gathered parameters between forward and backward."""
    cpu_offload: bool = False
    """Keep the shards in CPU memory, and step the optimizer there."""
    version: Annotated[Literal[1, 2], BeforeValidator(no_flag)] = 2
    """1 is torch's older FSDP, through the transformers trainer only."""

    def sizes(self, processes: int) -> tuple[int, int]:
        """(replicas, shards) for so many processes. ValueError where they do not come out even."""
        replicas, shards = self.replicas, self.shards
        if shards is None:
            replicas = replicas or 1
            shards = max(processes // replicas, 1)
        elif replicas is None:
            replicas = max(processes // shards, 1)
        if replicas * shards != processes:
            raise ValueError(
                f"train.parallel: {replicas} replicas × {shards} shards need {replicas * shards} processes, but there "
                f"are {processes}"
            )
        return replicas, shards


class DeepSpeed(Config):
    """ZeRO (Rajbhandari et al. 2020), through the transformers trainer."""

    kind: Literal["deepspeed"] = "deepspeed"
    """Shard with DeepSpeed."""
    zero_stage: Annotated[Literal[1, 2, 3], BeforeValidator(no_flag)] = 3
    """1 shards optimizer state, 2 gradients too, 3 parameters too."""
    cpu_offload: bool = False
    """Keep optimizer state in CPU memory and step there; with zero_stage 3 the parameters, too."""
    hpz: Positive | None = None
    """ZeRO++: processes that keep a second copy of the shards among them, so that backward passes gather within a node;
    usually a node's GPUs."""
    qwz: bool = False
    """ZeRO++: gather weights in 8 bits."""
    qgz: bool = False
    """ZeRO++: reduce gradients in 4 bits."""
    config: str | None = None
    """A DeepSpeed JSON file of your own, instead of the one made from this recipe (`controlllm config show RECIPE
    --deepspeed`); batch sizes, clipping and precision in it must be auto or as the recipe says."""

    @model_validator(mode="after")
    def _stage_fits(self) -> "DeepSpeed":
        for name in ("hpz", "qwz", "qgz"):
            if getattr(self, name) and self.zero_stage != 3:
                raise ValueError(f"{name} is of ZeRO++, which needs zero_stage 3, found {self.zero_stage}")
        return self


class TrainConfig(Config):
    """How it is trained."""

    trainer: Literal["native", "transformers"] = "native"
    """This package's loop, or transformers' Trainer."""
    steps: Positive | None = 1000
    """Optimizer steps; null for a run that is measured in tokens."""
    tokens: Positive | None = None
    """With steps: null, the run ends after the step in which this many tokens have been seen."""
    lr: Annotated[Number, Field(gt=0, le=1)] = 5e-5
    """Peak learning rate."""
    global_batch_size: Positive = 8
    """Packed rows per optimizer step, over all processes, whatever their number."""
    micro_batch_size: Positive = 1
    """Packed rows per forward pass and process; the rest is gradient accumulation."""
    precision: Literal["bf16", "bf16_stochastic", "bf16_kahan", "fp16", "float8", "float32"] = "bf16"
    """bf16, fp16 (with a loss scale), float8: computed in it around float32 masters. bf16_stochastic and bf16_kahan
    keep what is trained in bf16 only, and round its steps stochastically or keep what rounding lost beside it."""
    seed: Count = 0
    """Of everything random in training."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Compute activations again in the backward pass: all of a block (full: least memory, a third more time) or all but
    its matrix products and attention (selective)."""
    compile: Literal["none", "inductor", "aot_eager"] = "none"
    """torch.compile each block, with this backend."""
    kernels: Literal["auto", "torch", "liger"] = "auto"
    """Norms, rotary embedding, MLP and the loss; auto takes Liger's on a GPU where they fit the model."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: Annotated[DDP | FSDP | DeepSpeed, Field(discriminator="kind")] = DDP()
    """How several processes share the work; their number is the launcher's."""
    guards: GuardsConfig = GuardsConfig()
    metrics: MetricsConfig = MetricsConfig()
    profile: ProfileConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.parallel.kind == "deepspeed" and self.trainer == "native":
            raise ValueError("parallel.kind deepspeed needs trainer: transformers; the native trainer shards with FSDP")
        flat = self.parallel.kind == "fsdp" and self.parallel.version == 1
        if flat and self.trainer == "native":
            raise ValueError("parallel.version 1 needs trainer: transformers; the native trainer shards with version 2")
        if flat and (self.optimizer.name != "adamw" or self.precision not in ("bf16", "fp16", "float32")):
            raise ValueError(
                "parallel.version 1 goes with optimizer.name adamw and precision bf16, fp16 or float32; use version 2, "
                f"found {self.optimizer.name} and {self.precision}"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        if self.optimizer.name == "adamw_8bit" and self.precision in ("bf16_stochastic", "bf16_kahan"):
            raise ValueError(f"optimizer.name adamw_8bit needs float32 masters: precision {self.precision} has none")
        return self

    @model_validator(mode="after")
    def _length(self) -> "TrainConfig":
        schedule = self.schedule
        if self.tokens is None:
            if self.steps is None:
                raise ValueError("steps and tokens are both null: say how long the run is with one of them")
            if schedule.warmup_tokens:
                raise ValueError("schedule.warmup_tokens is for a run measured in tokens: use schedule.warmup_steps")
            if schedule.warmup_steps >= self.steps:
                raise ValueError(f"schedule.warmup_steps {schedule.warmup_steps} leaves none of {self.steps} steps")
            return self
        if self.steps is not None:
            raise ValueError("steps and tokens both say how long the run is: set steps to null to use tokens")
        if schedule.warmup_steps:
            raise ValueError("tokens measures the run: use schedule.warmup_tokens instead of schedule.warmup_steps")
        if schedule.warmup_tokens >= self.tokens:
            raise ValueError(f"schedule.warmup_tokens {schedule.warmup_tokens} leaves none of {self.tokens} tokens")
        return self
