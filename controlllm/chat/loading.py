"""A checkpoint of any stage as a model that can answer, and what there is to say of it in a line."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlllm.chat.places import Adapter, Model, Place, Trained
from controlllm.errors import UserError
from controlllm.whole import check_whole, read_object

Json = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A model on its device."""

    model: Any
    folder: Path
    """That has the tokenizer."""


def load_place(place: Place, *, dtype: str | None) -> Loaded:
    """On the GPU if there is one. dtype: by its name in torch; the folder's own when left out.

    UserError for weights that are missing, damaged or of another model.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    match place:
        case Model(folder):
            model = load_folder(folder, dtype=dtype)
        case Trained(folder=folder):
            own = place.dtype if device == "cuda" else "float32"
            model = _load_trained(place).to(getattr(torch, dtype or own))
        case Adapter(folder, base):
            model = _load_adapter(folder, load_folder(base, dtype=dtype))
    return Loaded(model.to(device), tokenizer_folder(place))


def tokenizer_folder(place: Place) -> Path:
    return place.folder if isinstance(place, Model) else place.base


def load_tokenizer(folder: Path) -> Any:
    """UserError where there is none, or one that is not the model's."""
    rows = read_object(folder / "config.json").get("vocab_size")
    from transformers import AutoTokenizer

    with _in_one_line(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    if isinstance(rows, int) and size > rows:
        raise UserError(
            f"{folder}: its tokenizer has {size:,} tokens and the model {rows:,} embeddings: it is another model's; "
            "copy the tokenizer's files of its own"
        )
    return tokenizer


def load_folder(folder: Path, *, dtype: str | None) -> Any:
    """Through our classes where the folder's config.json asks for them, so that there is a dial."""
    import controlllm
    from controlllm.tuned import load_tuned

    control = read_object(folder / "config.json").get("control")
    check_whole(folder, {file.name: file for file in folder.iterdir() if file.is_file()})
    with _in_one_line(folder, "weights"):
        if control:
            return controlllm.load(folder, alpha_scale=control.get("alpha_scale", 1.0), dtype=dtype)
        return load_tuned(folder, dtype=dtype)


def _load_trained(place: Trained) -> Any:
    """In float32 where it was trained, as it is consolidated."""
    from controlllm.config import ModelConfig
    from controlllm.train.checkpoint_tensors import read_tensors
    from controlllm.train.model import load_model
    from controlllm.train.quantize import dequantise_
    from controlllm.train.trained import load_trained

    kept = ModelConfig(name=str(place.base), dtype=place.dtype, attention="sdpa")  # type: ignore[arg-type]
    with _in_one_line(place.base, "weights"):
        model = load_model(place.base, kept, place.method, seed=place.seed)
    try:
        if place.step is None:
            load_trained(place.folder, model)
        else:
            read_tensors(place.folder, model)
    except UserError as error:
        why = str(error).removeprefix(f"{place.folder}: ").partition(";")[0].removeprefix("is of another run: ")
        raise UserError(
            f"{place.folder}: does not fit the base {place.base}: {why}; give its own with --base"
        ) from None
    if place.method.quantization:
        dequantise_(model)
    return model


def _load_adapter(folder: Path, base: Any) -> Any:
    """Virtual tokens by our own code, other adapters merged by PEFT."""
    from controlllm.train.prompt_files import KINDS, load_prompt

    kind = read_object(folder / "adapter_config.json").get("peft_type")
    if kind in KINDS:
        load_prompt(base, folder)
        return base
    from peft import PeftModel

    with _in_one_line(folder, "adapter"):
        return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()  # type: ignore[operator]


@contextmanager
def _in_one_line(folder: Path, what: str) -> Iterator[None]:
    """What transformers, PEFT and safetensors say against a folder."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{folder}: its {what} cannot be loaded: {said}; copy the checkpoint again") from None
