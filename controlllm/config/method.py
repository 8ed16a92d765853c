"""The base model and what of it is trained: twins, adapters, some blocks, or all."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from controlllm.config.base import Config, Count, Number, Positive

# As registered in control/interpolation.py, which is read and not imported, because it needs torch.
_SOURCE = Path(__file__).parents[1] / "control" / "interpolation.py"
INTERPOLATIONS = tuple(re.findall(r'^@strategy\("(\w+)"\)', _SOURCE.read_text(encoding="utf-8"), re.MULTILINE))
# Interpolations with one weight per site, and not one per token.
SCALAR_ALPHA = ("lerp", "slerp", "prog", "proj")


class ModelConfig(Config):
    """The base model."""

    name: str = Field(min_length=1)
    """A directory, a Hugging Face id, or `pkg://package/file.gguf` for weights that an installed package ships."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Storage of the frozen weights while training; what is trained is always kept in float32."""
    attention: Literal["packed", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"] = "packed"
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
    twin: Literal["full", "lora", "ia3"] = "full"
    """full is a copy of the block; lora and ia3 share the frozen block's own weights and train what the section of that
    name says upon them."""
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
    def _twin_fits(self) -> "ControlConfig":
        if self.twin != "full" and self.layout != "concat":
            raise ValueError(
                f"twin {self.twin} shares the weights of the block beside it, and layout {self.layout} has "
                "twins without one: use layout concat or twin full"
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
    """Low-rank adapters (Hu et al. 2021), merged into the weights when the run is consolidated."""

    rank: Positive = 16
    """Inner width of an adapter."""
    alpha: Annotated[Number, Field(gt=0)] = 32.0
    """An adapter's output is scaled by alpha / rank."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is dropped while training."""
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023), so that a large rank learns as fast as a small one."""
    dora: bool = False
    """Train the length of each weight row apart from its direction, too (Liu et al. 2024)."""


class IA3Config(Config):
    """Learned factors on the outputs or inputs of linear layers (Liu et al. 2022), merged when consolidated."""

    target_modules: Annotated[list[str], Field(min_length=1)] = ["k_proj", "v_proj", "down_proj"]
    """Names of the linear layers that are scaled."""
    feedforward_modules: list[str] = ["down_proj"]
    """Those of them whose input is scaled, and not the output."""

    @model_validator(mode="after")
    def _feedforward_scaled(self) -> "IA3Config":
        if odd := sorted(set(self.feedforward_modules) - set(self.target_modules)):
            raise ValueError(f"feedforward_modules names {odd[0]}, which is not in target_modules")
        return self


class PromptConfig(Config):
    """Trained virtual tokens before every document; no weight of the model changes."""

    kind: Literal["prompt", "prefix"] = "prompt"
    """prompt trains embeddings (Lester et al. 2021), prefix keys and values of every layer (Li and Liang 2021)."""
    num_virtual_tokens: Positive = 20
    """Their number; pack.context_length and they together must fit into the model's positions."""
    init_text: str | None = None
    """Text whose embeddings a prompt starts from; random ones of the vocabulary when left out."""

    @model_validator(mode="after")
    def _text_for_prompt(self) -> "PromptConfig":
        if self.kind == "prefix" and self.init_text is not None:
            raise ValueError("init_text is for kind prompt: a prefix has no embeddings")
        return self


class PartialConfig(Config):
    """Fine-tuning of some of the model's own blocks; the others, embeddings and head stay as they are."""

    num_blocks: Positive = 8
    """Number of blocks; with an explicit list it must be the list's length."""
    blocks: Literal["top", "bottom", "evenly"] | list[Count] = "top"
    """Which ones; a list gives the layer indices themselves."""

    @model_validator(mode="after")
    def _blocks_match(self) -> "PartialConfig":
        if isinstance(self.blocks, list):
            if self.blocks != sorted(set(self.blocks)):
                raise ValueError(f"blocks {self.blocks} must be ascending and without repeats")
            if len(self.blocks) != self.num_blocks:
                raise ValueError(f"num_blocks is {self.num_blocks} but blocks lists {len(self.blocks)} layers")
        return self


class QuantizationConfig(Config):
    """Storage of the blocks' frozen matrices in fewer bits; what is trained stays as precise as ever."""

    kind: Literal["nf4", "int8", "int8_torchao", "float8"] = "nf4"
    """4-bit NormalFloat or 8-bit integers by bitsandbytes; 8-bit integers or floats by torchao."""
    double_quant: bool = True
    """Of nf4: keep the scales in 8 bits, too, which saves 0.4 bits a weight (Dettmers et al. 2023)."""


class Method(Config):
    """What is trained: twins, adapters, virtual tokens, some blocks; everything when all are off."""

    control: ControlConfig | None = None
    lora: LoRAConfig | None = None
    ia3: IA3Config | None = None
    prompt: PromptConfig | None = None
    partial: PartialConfig | None = None
    quantization: QuantizationConfig | None = None

    @property
    def trains_all(self) -> bool:
        """Whether no weight is frozen."""
        return not (self.control or self.lora or self.ia3 or self.prompt or self.partial)

    @property
    def adapters(self) -> str:
        """`DoRA of rank 16`; empty without adapters."""
        if self.ia3:
            return "IA3"
        if self.lora is None:
            return ""
        kind = "DoRA" if self.lora.dora else "LoRA"
        return f"{'rank-stabilised ' if self.lora.rslora else ''}{kind} of rank {self.lora.rank}"
