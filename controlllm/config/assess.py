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
    """Of the skill that is learned: probes (offline items), suites (math, code, ...) or single tasks of a suite."""
    old: list[str] = ["mmlu-dev", "prose", "python", "chat", "drift"]
    """Of what must not be forgotten; named as in new, and never trained on."""
    items: Positive | dict[str, Positive] | None = None
    """Items per task (of a group of subtasks: per subtask), for all of them or by name; all items when left out."""
    batch_size: Positive = 16
    """Items at a time."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type in which both models are measured."""
    backend: Literal["auto", "hf", "vllm"] = "auto"
    """What runs the model: transformers, vLLM, or for each kind of task the faster of what is installed."""
    processes: Positive | None = None
    """Copies of the model that share the items under backend hf; one per GPU when left out, one without a GPU."""
    prompts: Literal["instruct", "pretrain"] | None = None
    """How suites ask: as a chat, or as text to go on with; chat where the tokenizer has a template, when left out."""
    data: str | None = None
    """A folder with the suites' datasets as org/name, instead of the Hub and its cache."""
    run_code: bool = False
    """Run programs that the model writes, in a sandbox without network; tasks that need it are refused otherwise."""
    margin: Annotated[Number, Field(gt=0)] = 2.0
    """A skill is kept if it surely fell by less: points of right answers, or per cent of the base's loss."""
    gate: dict[str, Number] = {}
    """The lowest change that a promotion allows, by task, suite, or old and new: {general: -2.0}. Units as margin."""

    def items_of(self, task: str) -> int | None:
        return self.items.get(task) if isinstance(self.items, dict) else self.items

    @model_validator(mode="after")
    def _names_once(self) -> "BenchmarkConfig":
        if both := sorted(set(self.new) & set(self.old)):
            raise ValueError(f"old names {both[0]}, which is in new, too: a task is of one side")
        return self


class SmokeConfig(Config):
    """vLLM's own server loads the tuned model, and must give the tokens that transformers gives."""

    prompts: Positive = 16
    """Number of prompts: the project's own (256 of them, in many languages) and those of the probes, in turn."""
    max_new_tokens: Positive = 32
    """Tokens generated for each."""
    min_agreement: Annotated[Number, Field(ge=0, le=1)] = 0.99
    """Share of greedy tokens that must be equal, in float32."""
    max_logprob_difference: Annotated[Number, Field(gt=0)] = 1e-3
    """By how much the log-probability of a token may differ that both engines chose."""
    endpoint: bool = True
    """Ask for a chat through the openai client, too."""
    timeout_seconds: Annotated[Number, Field(gt=0)] = 1800.0
    """From the start of the engine to its last answer."""


class ReportConfig(Config):
    """The HTML page at the end."""

    contrast: list[Name] = []
    """Other runs (by name, in the same output folder) whose changes are drawn beside this one's, where they exist."""
    dial: list[Annotated[Number, Field(ge=0, le=1)]] = []
    """Alpha scales (0 the base, 1 the trained model) that are measured, too, for the curve of gain against cost."""


class ProbeConfig(Config):
    """A look inside the tuned model beside its base, on prompts."""

    prompts: str | list[str]
    """A file (.txt: a prompt per line; .jsonl: rows with prompt or messages), or the prompts themselves."""
    items: Positive = 16
    """Prompts, the first of them."""
    tokens: Positive = 128
    """Tokens of a prompt; longer ones are cut."""
    lens_tokens: Positive = 8
    """Last tokens of a prompt whose prediction is followed through the layers."""
    drawn: Positive = 2
    """Prompts that are drawn token by token; the numbers of all are kept."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type in which both models run; the checkpoint's own when left out."""
