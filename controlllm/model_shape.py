"""What a base model's files say before they are loaded: are they all there, how many layers, how long a context."""

import difflib
import json
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlllm.data.sources import source_files
from controlllm.errors import UserError
from controlllm.gguf_header import read_header

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# Families whose head and embeddings are one matrix unless their config says otherwise.
_TIED = ("gemma", "cohere", "gpt2", "phi3small", "opt", "bloom")
# Kinds of blocks that `Decoder` does not describe: experts, latent attention, state spaces.
_OTHER_BLOCKS = re.compile(r"expert|kv_lora|ssm|mamba|linear_(num|key|conv)")
# A GGUF file's metadata and list of tensors are at its beginning.
_GGUF_HEAD = 64 << 20
_HF_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Decoder:
    """Sizes of a dense decoder."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the head is the embedding matrix."""

    @property
    def block_matrices(self) -> int:
        """Weights of a block's linear maps: query, key, value, output; gate, up and down."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def block(self) -> int:
        """All weights of a block."""
        return self.block_matrices + 2 * self.hidden

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def outer(self) -> int:
        """All weights that belong to no block: embedding, last norm, head."""
        return self.embedding * (1 if self.tied else 2) + self.hidden


@dataclass(frozen=True)
class Shape:
    """Enough of a model to check settings against."""

    layers: int
    max_positions: int | None
    path: Path
    weight_bytes: int
    decoder: Decoder | None = None
    """None where the files do not say, or the blocks are of another kind (experts, ...)."""


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
    return Shape(layers, header.get(".context_length"), files[0], files[0].stat().st_size, _gguf_decoder(files[0]))


def _gguf_decoder(file: Path) -> Decoder | None:
    """By searching the file's beginning, because reading all its words first would take too long."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        end = min(len(view), _GGUF_HEAD)
        words = _gguf_number(view, ".vocab_size", end) or _gguf_list_length(view, "tokenizer.ggml.tokens", end)
        hidden, inner, heads, kv_heads, key_length = (
            _gguf_number(view, f".{name}", end)
            for name in ("embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
                         "attention.key_length")
        )  # fmt: skip
        if not (hidden and inner and heads and words) or view.find(b".expert_count", 0, end) >= 0:
            return None
        tied = view.find(struct.pack("<Q", 13) + b"output.weight", 0, end) < 0
    return Decoder(hidden, inner, heads, kv_heads or heads, key_length or hidden // heads, words, tied)


def _gguf_number(view: mmap.mmap, ending: str, end: int) -> int | None:
    """The value of the first key that ends so, if it is a 32-bit number."""
    found = view.find(key := ending.encode() + struct.pack("<I", 4), 0, end)
    return None if found < 0 else struct.unpack_from("<I", view, found + len(key))[0]


def _gguf_list_length(view: mmap.mmap, name: str, end: int) -> int | None:
    found = view.find(key := name.encode() + struct.pack("<II", 9, 8), 0, end)
    return None if found < 0 else struct.unpack_from("<Q", view, found + len(key))[0]


def _folder(folder: Path) -> Shape:
    config = _json(folder / "config.json", folder)
    if "base_model_type" in config:
        raise UserError(
            f"{folder}: its blocks have twins already; fold it first (controlllm fold {folder} FOLDED) and name that"
        )
    if "prompt" in config:
        raise UserError(
            f"{folder}: was trained with virtual tokens, which would be left out; name the model it was trained from"
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
    return Shape(
        layers, positions if isinstance(positions, int) else None, folder, weight_bytes, _decoder(text, config)
    )


def _decoder(text: dict[str, Any], config: dict[str, Any]) -> Decoder | None:
    def size(name: str) -> int:
        value = text.get(name)
        return value if isinstance(value, int) else 0

    hidden, inner, heads, words = map(size, ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"))
    if not (hidden and inner and heads and words) or any(map(_OTHER_BLOCKS.search, _given(text))):
        return None
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if tied is None:
        tied = str(text.get("model_type", "")).startswith(_TIED)
    head_dim = size("head_dim") or hidden // heads
    return Decoder(hidden, inner, heads, size("num_key_value_heads") or heads, head_dim, words, bool(tied))


def _given(text: dict[str, Any]) -> list[str]:
    return [name for name, value in text.items() if value]


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
