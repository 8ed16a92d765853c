"""What a run does, as one frozen tree: `load_config("demo.yaml", "train.lr=1e-4")` builds it.

Nothing here imports torch, so that a mistake is reported within a second.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from controlllm.errors import UserError
from controlllm.mistakes import explain
from controlllm.recipe import Source, read

_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def _yaml_exponent(value: Any) -> Any:
    """YAML 1.1 readers (pyflyte's is one) hand over `1e-4` as text; everyone who writes it means the number."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _no_flag(value: Any) -> Any:
    """`true` equals 1 in Python, but nobody who writes it means the number."""
    return str(value).lower() if isinstance(value, bool) else value


Number = Annotated[float, BeforeValidator(_yaml_exponent), Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Positive = Annotated[PositiveInt, Field(le=10**12)]
# As registered in control/interpolation.py, which is read and not imported, because it needs torch.
_SOURCE = Path(__file__).with_name("control") / "interpolation.py"
INTERPOLATIONS = tuple(re.findall(r'^@strategy\("(\w+)"\)', _SOURCE.read_text(encoding="utf-8"), re.MULTILINE))
# Interpolations with one weight per site, and not one per token.
SCALAR_ALPHA = ("lerp", "slerp", "prog", "proj")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Config(BaseModel):
    """A frozen section; an unknown key and a value of another type are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class ModelConfig(Config):
    """The base model."""

    name: str = Field(min_length=1)
    """A directory, a Hugging Face id, or `pkg://package/file.gguf` for weights that an installed package ships."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Storage of the frozen weights while training; what is trained is always kept in float32."""
    attention: Literal["packed", "sdpa", "eager", "flex_attention", "flash_attention_2"] = "packed"
    """Kernel while training: packed runs each document of a row by itself, the others are transformers' names."""


class RampConfig(Config):
    """How a weight moves while training, from its own value to `final`; constant keeps it."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the way."""
    final: Annotated[Number, Field(ge=0)] | None = None
    """Value at the end of it."""
    steps: Positive | None = None
    """Optimizer steps it takes; all of the run when left out."""

    @model_validator(mode="after")
    def _final_given(self) -> "RampConfig":
        if (self.kind == "constant") != (self.final is None):
            need = "takes no final" if self.kind == "constant" else "needs final, the value at the end"
            raise ValueError(f"kind {self.kind} {need}")
        return self


class ControlConfig(Config):
    """Which blocks get a trainable twin, and how the pair is held together (arXiv 2501.10979)."""

    layout: Literal["concat", "stack", "hybrid"] = "concat"
    """concat runs the twin beside the frozen block, stack after it, hybrid alternates: stack, concat, stack, ..."""
    num_expanded: Positive = 8
    """Number of sites E; with an explicit list of sites it must be the list's length."""
    sites: Literal["evenly", "top", "every_nth_of_top"] | list[Count] = "evenly"
    """Where the twins stand; a list gives the layer indices themselves."""
    every_nth: Positive = 2
    """Distance between two sites of every_nth_of_top, counted down from the last layer."""
    interpolation: Literal[*INTERPOLATIONS] = "lerp"  # type: ignore[valid-type] - known when this is imported
    """How the outputs of block and twin are blended; none takes the twin's alone."""
    alpha: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """Weight of the twin's output at the start."""
    train_alpha: bool = True
    """Whether that weight (of a gate: its bias) is learned."""
    alpha_schedule: RampConfig = RampConfig()
    """Moves it by the step instead; needs train_alpha: false."""
    norm_relaxation: Annotated[Number, Field(ge=0, le=1)] | Literal["learned"] = 0.0
    """Share of its input that each norm of the twin lets through; learned starts at 0, a number above 0 starts away
    from the base model."""
    divergence: Literal["mse", "cosine", "dot", "attention", "none"] = "mse"
    """Loss that holds the twin's output near the frozen block's; attention compares attention maps."""
    divergence_weight: Annotated[Number, Field(ge=0)] = 1.0
    """Its weight beside the cross-entropy."""
    divergence_schedule: RampConfig = RampConfig()
    """Moves that weight by the step."""
    divergence_alpha: Literal["fixed", "gate"] = "fixed"
    """gate weighs each token's divergence by the weight of the twin's output there."""
    teacher: Literal["block", "trajectory"] = "block"
    """What the twin is held to: the frozen block on the same input, or the base model's own hidden state there."""
    detach_teacher: bool = True
    """Whether the divergence's gradient stops at the frozen block's output."""

    @model_validator(mode="after")
    def _sites_match(self) -> "ControlConfig":
        if isinstance(self.sites, list):
            if self.sites != sorted(set(self.sites)):
                raise ValueError(f"sites {self.sites} must be ascending and without repeats")
            if len(self.sites) != self.num_expanded:
                raise ValueError(f"num_expanded is {self.num_expanded} but sites lists {len(self.sites)} layers")
        if self.layout == "hybrid" and self.num_expanded % 2:
            raise ValueError(
                f"layout hybrid alternates stack and concat: num_expanded must be even, found {self.num_expanded}"
            )
        return self

    @model_validator(mode="after")
    def _schedules_fit(self) -> "ControlConfig":
        final = self.alpha_schedule.final
        if final is None:
            return self
        if self.train_alpha:
            raise ValueError("alpha_schedule moves a weight that train_alpha would learn: set train_alpha to false")
        if self.layout == "stack" or self.interpolation not in SCALAR_ALPHA:
            what = "layout stack" if self.layout == "stack" else f"interpolation {self.interpolation}"
            raise ValueError(f"alpha_schedule needs one weight per site ({', '.join(SCALAR_ALPHA)}); {what} has none")
        if not 0 < final < 1:
            raise ValueError(f"alpha_schedule.final must be between 0 and 1, found {final}")
        return self

    @model_validator(mode="after")
    def _divergence_fits(self) -> "ControlConfig":
        if self.divergence == "attention" and self.teacher == "trajectory":
            raise ValueError("teacher trajectory keeps hidden states: divergence attention needs teacher: block")
        return self


class LoRAConfig(Config):
    """Low-rank adapters instead of twins."""

    rank: Positive = 16
    """Inner width of an adapter."""
    alpha: Annotated[Number, Field(gt=0)] = 32.0
    """An adapter's output is scaled by alpha / rank."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is dropped while training."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter."""


class QuantizationConfig(Config):
    """Storage of the frozen weights in fewer bits."""

    kind: Literal["nf4", "int8"] = "nf4"
    """4-bit NormalFloat or 8-bit integers."""


class PackConfig(Config):
    """How rows become packed token rows: everything here changes tokens on disk, and nothing else lives here."""

    context_length: Positive = 8192
    """Tokens per packed row."""
    strategy: Literal["best_fit", "best_fit_stream", "pad", "wrap"] = "best_fit"
    """best_fit fills each row with whole documents; best_fit_stream does so in a window of them, in their order; pad
    puts one document into each row and rows of similar length side by side; wrap lets text run on from row to row."""
    overlong: Literal["split", "drop", "truncate", "error"] = "error"
    """What happens to a document longer than the context."""
    targets: Literal["assistant", "all"] = "assistant"
    """What is learned of a conversation: the assistant's turns and the EOS after each, or all. Of a text, all."""
    chat_template: str | None = None
    """A Jinja file to use instead of the tokenizer's own template."""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] = "2025-01-01"
    """What a template that writes today's date is told, so that the same rows give the same tokens on any day."""
    tokenizer: Literal["auto", "transformers"] = "auto"
    """auto takes a faster tokenizer where it gives identical tokens on a sample of the data."""
    validation_fraction: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of the documents, chosen by their content, that is kept back for validation and never trained on."""
    max_bad_rows: Annotated[Number, Field(ge=0, le=1)] = 0.001
    """Share of a dataset's rows that may be unreadable or without a target (and are set aside) before the run stops."""
    unit_rows: Positive = 65536
    """Rows that are packed together into one shard; the first shard has a quarter, so that training can start."""
    streaming: bool = False
    """Train on the first shard while the others are made: same order, same shards, no wait."""


class DatasetConfig(Config):
    """One dataset of the mix: a name from the catalog, or a source and how its fields are to be read."""

    name: Name
    """Of the catalog (`controlllm datasets`), or any name for a source of your own."""
    source: str | None = None
    """`hf://org/name:config#split`, `hdfs://`, `webhdfs://`, `s3://`, `gs://`, `file://`, `pkg://package/path` or a
    path; globs allowed. With a name of the catalog: where else its files are."""
    format: Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"] | None = None
    """What a row of the source holds; left out for a name of the catalog."""
    fields: dict[str, str] = {}
    """What the source calls the fields: `{prompt: question, completion: answer}`."""
    rows: Positive | None = None
    """Rows to take, from the beginning; all when left out."""
    fraction: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Share of the rows to take, chosen by their content: adding rows never changes the choice."""
    preprocess: list[dict[str, dict[str, Any]]] = []
    """Filters and maps in order: `[{length: {max_chars: 8000}}, {language: {keep: [en]}}]` (`controlllm steps`)."""
    dedup: bool = False
    """Keep only the first of equal documents."""
    seed: Count = 0
    """Which rows a procedural source makes."""
    epochs: Annotated[Number, Field(gt=0)] = 1.0
    """How often its rows are shown in one pass over the mix; for mixes without weights."""
    weight: Annotated[Number, Field(gt=0)] | None = None
    """Share of the mix's tokens, relative to the other datasets' weights; all of them have one, or none."""


class MixConfig(Config):
    """What is trained on."""

    datasets: list[DatasetConfig] = Field(min_length=1)
    """One or more."""
    seed: Count = 0
    """Order of the packed rows."""
    temperature: Annotated[Number, Field(ge=1)] = 1.0
    """Above 1, small datasets get more than their share: tokens to the power of 1 / temperature."""
    order: Literal["shuffle", "source", "length"] = "shuffle"
    """shuffle; source keeps the order of the files; length goes from short documents to long ones."""
    decontaminate: Literal["exact", "ngram", "none"] = "exact"
    """Leave out rows that ask what is measured: the same question, or a run of `decontaminate_words` words of it."""
    decontaminate_words: Positive = 13
    """Words in a row that make a row contaminated, with decontaminate: ngram."""

    @model_validator(mode="after")
    def _names_once(self) -> "MixConfig":
        names = [dataset.name for dataset in self.datasets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"datasets names {', '.join(twice)} more than once")
        return self

    @model_validator(mode="after")
    def _shares_said_once(self) -> "MixConfig":
        without = [d.name for d in self.datasets if d.weight is None]
        weighted = [d for d in self.datasets if d.weight is not None]
        if weighted and without:
            raise ValueError(
                f"datasets: {weighted[0].name} has a weight and {without[0]} has none: give all one, or none"
            )
        if weighted and (self.temperature != 1 or any(d.epochs != 1 for d in weighted)):
            raise ValueError("datasets have weights, which say their shares already: leave epochs and temperature out")
        return self


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
    """Applied to matrices only."""
    max_grad_norm: Annotated[Number, Field(gt=0)] = 1.0
    """Gradients with a larger norm are scaled down to it."""


class ScheduleConfig(Config):
    """The learning rate over the steps."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_steps: Count = 0
    """Steps of linear rise to the peak."""
    final_fraction: Annotated[Number, Field(ge=0, le=1)] = 0.1
    """Learning rate at the last step, as a fraction of `train.lr`."""


class CheckpointConfig(Config):
    """What a run that was stopped goes on from."""

    every: Positive = 500
    """Steps between checkpoints; a run that is started again goes on from the newest complete one."""
    keep: Positive = 2
    """Newest checkpoints that are kept."""


class ProfileConfig(Config):
    """A trace of a few steps."""

    start: Count = 10
    """First step that is traced."""
    steps: Positive = 5
    """Number of steps."""


class DDP(Config):
    """Every process holds the whole model; gradients are summed."""

    kind: Literal["ddp"] = "ddp"
    """Replicate."""


class FSDP(Config):
    """Parameters are sharded over the processes."""

    kind: Literal["fsdp"] = "fsdp"
    """Shard with torch."""
    replicas: Positive = 1
    """More than one is HSDP: shard within a replica, all-reduce between replicas."""
    reshard_after_forward: bool = True
    """Free a block's gathered parameters between forward and backward."""
    cpu_offload: bool = False
    """Keep the shards in CPU memory."""


class DeepSpeed(Config):
    """ZeRO, through the transformers trainer."""

    kind: Literal["deepspeed"] = "deepspeed"
    """Shard with DeepSpeed."""
    zero_stage: Annotated[Literal[1, 2, 3], BeforeValidator(_no_flag)] = 3
    """1 shards optimizer state, 2 gradients too, 3 parameters too."""
    cpu_offload: bool = False
    """Keep optimizer state in CPU memory."""


class TrainConfig(Config):
    """How the twins are trained."""

    trainer: Literal["native", "transformers"] = "native"
    """This package's loop, or transformers' Trainer."""
    steps: Positive = 1000
    """Optimizer steps."""
    lr: Annotated[Number, Field(gt=0, le=1)] = 5e-5
    """Peak learning rate."""
    global_batch_size: Positive = 8
    """Packed rows per optimizer step, over all processes."""
    micro_batch_size: Positive = 1
    """Packed rows per forward pass and process; the rest is gradient accumulation."""
    precision: Literal["bf16", "float32"] = "bf16"
    """bf16: autocast around float32 masters."""
    seed: Count = 0
    """Of everything random in training."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """torch.compile each block."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: Annotated[DDP | FSDP | DeepSpeed, Field(discriminator="kind")] = DDP()
    """How several processes share the work."""
    profile: ProfileConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.parallel.kind == "deepspeed" and self.trainer == "native":
            raise ValueError("parallel.kind deepspeed needs trainer: transformers; the native trainer shards with FSDP")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        if self.schedule.warmup_steps >= self.steps:
            raise ValueError(f"schedule.warmup_steps {self.schedule.warmup_steps} leaves none of {self.steps} steps")
        return self


class ValidationConfig(Config):
    """Loss on the documents that `pack.validation_fraction` keeps back, while training."""

    every: Positive = 50
    """Steps between two validations."""
    rows: Positive = 8
    """Packed rows to look at."""


class BenchmarkConfig(Config):
    """What is measured, before and after."""

    new: list[str] = ["puzzles"]
    """Probes of the skill that is learned."""
    old: list[str] = ["mmlu", "prose", "code", "chat", "drift"]
    """Probes of what must not be forgotten; never trained on."""
    items: Positive | dict[str, Positive] | None = None
    """Items per probe, for all of them or by name; all items of a probe when left out."""

    def items_of(self, probe: str) -> int | None:
        return self.items.get(probe) if isinstance(self.items, dict) else self.items

    batch_size: Positive = 16
    """Items at a time."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type in which both models are measured."""
    backend: Literal["hf", "vllm"] = "hf"
    """What generates the answers."""

    @model_validator(mode="after")
    def _names_once(self) -> "BenchmarkConfig":
        if both := sorted(set(self.new) & set(self.old)):
            raise ValueError(f"old names {both[0]}, which is in new, too: a probe is of one side")
        return self


class SmokeConfig(Config):
    """vLLM loads the tuned model and must give the tokens that transformers gives."""

    prompts: Positive = 4
    """Number of prompts."""
    max_new_tokens: Positive = 24
    """Tokens generated for each."""
    min_agreement: Annotated[Number, Field(ge=0, le=1)] = 0.99
    """Share of greedy tokens that must be equal."""


class ReportConfig(Config):
    """The HTML page at the end."""

    contrast: list[Name] = []
    """Other runs (by name, in the same output folder) whose bars are drawn beside this one's, where they exist."""


class RunConfig(Config):
    """One run. Optional sections that are left out are off."""

    name: Name
    """Of the run and its folder."""
    output: Annotated[str, Field(min_length=1)] = "runs"
    """Folder in which `<name>/` with the report and a link to the model is put."""
    model: ModelConfig
    control: ControlConfig | None = None
    lora: LoRAConfig | None = None
    quantization: QuantizationConfig | None = None
    pack: PackConfig = PackConfig()
    mix: MixConfig
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig | None = None
    benchmark: BenchmarkConfig = BenchmarkConfig()
    smoke: SmokeConfig | None = SmokeConfig()
    report: ReportConfig = ReportConfig()
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Where else metrics go."""

    @model_validator(mode="after")
    def _one_method(self) -> "RunConfig":
        if self.pack.streaming and len(self.mix.datasets) > 1 and any(d.weight is None for d in self.mix.datasets):
            raise ValueError(
                "pack.streaming begins before the sizes of the datasets are known: give each of mix.datasets a weight"
            )
        if self.pack.streaming and self.mix.order == "length":
            raise ValueError("mix.order length sorts all rows, which pack.streaming does not wait for: choose one")
        if self.control and self.lora:
            raise ValueError("control and lora exclude each other: leave one section out")
        if self.validation and not self.pack.validation_fraction:
            raise ValueError("validation needs held-back documents: set pack.validation_fraction, for example to 0.02")
        if self.control and self.control.divergence == "attention" and self.model.attention != "eager":
            raise ValueError(
                "control.divergence attention needs the attention maps: set model.attention to eager, "
                f"found {self.model.attention}"
            )
        if self.quantization and not (self.control or self.lora):
            raise ValueError("quantization stores frozen weights: it needs a control or a lora section")
        return self


def load_config(recipe: str | Path, *overrides: str) -> RunConfig:
    """Read a YAML recipe, apply `section.key=value` overrides left to right, validate once.

    Raises UserError with one line that names file, line, key, what was found and what was expected.
    """
    return validate(*read(Path(recipe), *overrides))


def validate(tree: Any, source: Source) -> RunConfig:
    """The whole tree at once; the first mistake as one line."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, RunConfig, tree=tree, source=source)) from None
