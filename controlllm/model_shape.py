"""What a base model's files say before they are loaded: are they all there, how many layers, how long a context."""

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlllm.data.sources import source_files
from controlllm.errors import UserError
from controlllm.gguf_header import read_header

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_HF_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Shape:
    """Enough of a model to check settings against."""

    layers: int
    max_positions: int | None
    path: Path
    weight_bytes: int


def model_shape(name: str, *, revision: str | None = None) -> Shape | None:
    """The shape of `model.name`, or None for a Hugging Face id that is not on this machine yet.

    UserError for files that are missing, damaged or of a kind that is not loaded.
    """
    if name.endswith(".gguf") or "://" in name:
        return _gguf(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _folder(folder)
    if folder.exists():
        raise UserError(f"{name}: is a file; give the model's folder")
    if name.startswith((".", "/", "~")) or not _HF_ID.fullmatch(name):
        raise UserError(f"{name}: no such model folder{_nearest(folder)}")
    return _downloaded(name, revision)


def _gguf(name: str) -> Shape:
    if not name.endswith(".gguf"):
        raise UserError(f"{name}: give a folder, a Hugging Face id or pkg://package/file.gguf")
    files = source_files(name)
    if len(files) > 1:
        raise UserError(f"{name}: {len(files)} files match; name one of {', '.join(file.name for file in files)}")
    header = read_header(files[0], ".block_count", ".context_length")
    if not (layers := header.get(".block_count")):
        raise UserError(f"{files[0]}: does not say how many layers it has (block_count)")
    return Shape(layers, header.get(".context_length"), files[0], files[0].stat().st_size)


def _folder(folder: Path) -> Shape:
    config = _json(folder / "config.json", folder)
    if "base_model_type" in config:
        raise UserError(
            f"{folder}: its blocks have twins already; fold it first (controlllm fold {folder} FOLDED) and name that"
        )
    weights = _weights(folder)
    if not any((folder / file).exists() for file in _TOKENIZERS):
        raise UserError(f"{folder}: has no tokenizer; add {_TOKENIZERS[0]}")
    return _shape(config, folder, sum(file.stat().st_size for file in weights))


def _weights(folder: Path) -> list[Path]:
    """The safetensors files, all of them."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = _json(index, folder).get("weight_map")
        if not isinstance(names, dict):
            raise UserError(f"{index}: has no weight_map")
        if missing := sorted({str(file) for file in names.values() if not (folder / str(file)).is_file()}):
            raise UserError(f"{folder}: {missing[0]} is missing, which {index.name} names; copy the model again")
    if files := sorted(folder.glob("*.safetensors")):
        return files
    if pickles := sorted(file.name for ending in ("bin", "pt", "pth") for file in folder.glob(f"*.{ending}")):
        raise UserError(f"{folder}: {pickles[0]} is a pickle, which can run code; convert the weights to safetensors")
    raise UserError(f"{folder}: has no weights (*.safetensors)")


def _shape(config: dict[str, Any], folder: Path, weight_bytes: int) -> Shape:
    text = config.get("text_config", config)  # of a model that also sees or hears
    layers, positions = text.get("num_hidden_layers"), text.get("max_position_embeddings")
    if not isinstance(layers, int) or layers < 1:
        raise UserError(f"{folder / 'config.json'}: num_hidden_layers is {layers!r}; is this a decoder model?")
    return Shape(layers, positions if isinstance(positions, int) else None, folder, weight_bytes)


def _json(file: Path, folder: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{folder}: has no {file.name}; is this a Hugging Face model folder?")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: must hold an object, found {type(values).__name__}")
    return values


def _downloaded(name: str, revision: str | None) -> Shape | None:
    """A Hugging Face id by what the local cache has of it; the rest is checked after the download."""
    from huggingface_hub import try_to_load_from_cache  # 0.25 s

    file = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(file, str):
        return None
    folder = Path(file).parent
    return _shape(_json(Path(file), folder), folder, sum(f.stat().st_size for f in folder.glob("*.safetensors")))


def _nearest(folder: Path) -> str:
    try:
        names = [other.name for other in folder.parent.iterdir() if other.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(folder.name, names, n=1)
    return f"; did you mean {folder.parent / near[0]}?" if near else ""
