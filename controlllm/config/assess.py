"""What is measured, while training and after."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from controlllm.config.base import Config, Name, Number, Positive


class GenerateConfig(Config):
    """Answers that the model writes by itself to held-back questions: rouge and BLEU against the real ones."""

    items: Positive = 16
    """Questions, the first of the held-back conversations."""
    max_new_tokens: Positive = 64
    """Tokens per answer."""
    batch_size: Positive = 8
    """Questions at a time and process."""
    bleu_tokenize: Literal["13a", "zh", "ja-mecab", "ko-mecab", "intl", "char"] = "13a"
    """How sacreBLEU splits words; zh for Chinese."""


class RetentionConfig(Config):
    """Text of old skills that is looked at while training: its loss, and how far the model went from its base there."""

    probes: list[str] = Field(default=["prose"], min_length=1)
    """Of `benchmark.old`; those with a text or an answer whose loss can be taken."""
    items: Positive = 16
    """Items of each."""
    positions: Positive = 256
    """Tokens at which the base model's whole distribution is kept to compare with, over all probes."""


class BestConfig(Config):
    """The best validation of a run, by one of its metrics."""

    metric: str = "validation_loss"
    """As in metrics.jsonl: validation_loss, retention_loss, retention_kl, rougeL, bleu, ..."""
    goal: Literal["min", "max"] = "min"
    """Which way is better."""
    min_delta: Annotated[Number, Field(ge=0)] = 0.0
    """A smaller gain is none."""
    patience: Positive | None = None
    """Stop after this many validations in a row without a gain."""
    use: Literal["best", "last"] = "best"
    """Whose weights the run ends with."""


class ValidationConfig(Config):
    """What is looked at while training: loss on documents that `pack.validation_fraction` keeps back, and more."""

    every: Positive = 50
    """Steps between two validations."""
    rows: Positive = 8
    """Packed rows to look at."""
    generate: GenerateConfig | None = None
    retention: RetentionConfig | None = None
    best: BestConfig | None = None


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
