"""How the tuned model is written."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from controlllm.config.base import Config, Number


class ExportConfig(Config):
    """What `consolidate` writes: which form, in which numbers, and what becomes of the base model's own files."""

    form: Literal["expanded", "folded"] = "expanded"
    """expanded keeps the pairs as they were trained; folded makes each pair one block, so that the model is of the
    base's own architecture and no longer the same function. A stack, and what has no twins, is plain in both."""
    alpha: Literal["mean"] | Annotated[Number, Field(ge=0, le=1)] = "mean"
    """Weight of the twins in a folded model: mean is what each pair does, measured where it depends on the token."""
    dtype: Literal["float32", "bfloat16", "base"] = "float32"
    """In which config.json says that the model is loaded, and the widest that is written: base is that of most of the
    base's weights. What is stored narrower, as frozen weights are, stays so. Only float32 keeps what was trained to the
    last bit."""
    frozen: Literal["link", "copy"] = "link"
    """link makes the base's files part of the model, by hard links where the file system can, as far as all that they
    hold is frozen; copy writes every tensor anew."""
    max_shard_gb: Annotated[Number, Field(gt=0)] = 5.0
    """Size of a file that is written, in 10^9 bytes; a larger tensor has a file of its own."""

    @model_validator(mode="after")
    def _alpha_folds(self) -> "ExportConfig":
        if self.alpha != "mean" and self.form != "folded":
            raise ValueError(f"alpha {self.alpha:g} is for form folded: leave it out, or set form to folded")
        return self
