"""What is trained on, and how it becomes packed rows."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from controlllm.config.base import Config, Count, Name, Number, Positive


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
