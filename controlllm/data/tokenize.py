"""Text to token ids, by the fastest tokenizer that is proven to give the same ids as transformers'."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from typing import Any

import numpy as np
import orjson

from controlllm.data.hard_strings import hard_strings
from controlllm.errors import UserError

SAMPLE_TEXTS = 1000
SAMPLE_BYTES = 500_000
_BATCH = 500


@dataclass(eq=False)
class Backend:
    """Encodes text without adding special tokens, cutting or padding. Pickles as the tokenizer's JSON."""

    name: str
    """With its version: `fastokens 0.3.5`, `tokenizers 0.23.1`."""
    reason: str
    """Why it was chosen."""
    json: str
    byte_lengths: np.ndarray | None
    """(vocabulary,) int64, number of bytes that each id stands for; None where an id has no fixed number."""
    normal_form: str | None
    """NFC where the byte lengths hold only for text that is in this form."""
    fast: bool = False
    left_to_exact: int = 0
    """Texts that the fast one does not take, so far."""
    _built: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (tokens,) uint32, and offsets (texts + 1,) int64 of each text in them."""
        if self.fast:
            return self._encode_fast(list(texts))
        return _flat([e.ids for e in self._exact.encode_batch_fast(list(texts), add_special_tokens=False)])

    def _encode_fast(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            ids, offsets = self._get("fastokens", _fastokens).encode_batch_flat(texts)
        except ValueError:
            # One text with a byte that the vocabulary lacks spoils the batch; transformers leaves the byte out.
            if len(texts) == 1:
                self.left_to_exact += 1
                return _flat([self._exact.encode(texts[0], add_special_tokens=False).ids])
            half = len(texts) // 2
            (a, a_offsets), (b, b_offsets) = self._encode_fast(texts[:half]), self._encode_fast(texts[half:])
            return np.concatenate([a, b]), np.concatenate([a_offsets, b_offsets[1:] + len(a)])
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64)

    def encode_with_starts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and offsets as of `encode`, and for each token the character of its text that it begins with (int64)."""
        encodings = self._exact.encode_batch(list(texts), add_special_tokens=False)
        ids, offsets = _flat([encoding.ids for encoding in encodings])
        starts = chain.from_iterable(encoding.offsets for encoding in encodings)
        return ids, offsets, np.fromiter((start for start, _ in starts), np.int64, len(ids))

    @property
    def _exact(self) -> Any:
        return self._get("tokenizers", _tokenizers)

    def _get(self, kind: str, build: Any) -> Any:
        if kind not in self._built:
            self._built[kind] = build(self.json)
        return self._built[kind]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": {}}


def choose_backend(tokenizer: Any, sample: Sequence[str], *, mode: str = "auto") -> Backend:
    """The fast one where it gives identical ids on `sample` (1,000 texts or half a megabyte) and the hard strings."""
    exact = exact_backend(tokenizer)
    if mode == "transformers":
        return replace(exact, reason="pack.tokenizer is transformers")
    name = f"fastokens {version('fastokens')}"
    fast = replace(exact, name=name, fast=True)
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values()]
    own, hard = _limited(sample), hard_strings(added)
    try:
        fast._get("fastokens", _fastokens)
        different = _first_difference(fast, exact, [*own, *hard])
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return replace(exact, reason=f"{name} does not take this tokenizer: {first_line}")
    if different is not None:
        return replace(exact, reason=f"{name} gives other ids for {_shortened(different)}")
    fast.reason = f"identical on {len(own):,} texts of the data and {len(hard):,} built-in hard strings"
    if fast.left_to_exact:
        fast.reason += f", {fast.left_to_exact:,} of which {name} leaves to {exact.name}"
    return fast


def exact_backend(tokenizer: Any) -> Backend:
    """transformers' own, the reference."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"the model's tokenizer ({type(tokenizer).__name__}) has no tokenizer.json, which is needed here"
        )
    return _exact(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _exact(tokenizer: Any, size: int) -> Backend:
    """`size` is part of the key because tokens can be added later."""
    parts = orjson.loads(tokenizer.backend_tokenizer.to_str())
    # Special tokens are never added here, and a post-processor would only trim white space off the offsets.
    json = orjson.dumps(parts | {"truncation": None, "padding": None, "post_processor": None}).decode()
    normal_form = parts["normalizer"] and parts["normalizer"]["type"]
    return Backend(f"tokenizers {version('tokenizers')}", "the reference", json, _byte_lengths(parts), normal_form)


def _limited(sample: Sequence[str]) -> list[str]:
    taken, size = [], 0
    for text in sample[:SAMPLE_TEXTS]:
        size += len(text.encode())
        if taken and size > SAMPLE_BYTES:
            break
        taken.append(text)
    return taken


def _first_difference(fast: Backend, exact: Backend, texts: Sequence[str]) -> str | None:
    for begin in range(0, len(texts), _BATCH):
        some = texts[begin : begin + _BATCH]
        (ids, offsets), (want, want_offsets) = fast.encode(some), exact.encode(some)
        if np.array_equal(ids, want) and np.array_equal(offsets, want_offsets):
            continue
        for i, text in enumerate(some):
            if not np.array_equal(ids[offsets[i] : offsets[i + 1]], want[want_offsets[i] : want_offsets[i + 1]]):
                return text
    return None


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}... ({len(text)} characters)"


def _flat(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(ids) for ids in lists], out=offsets[1:])
    return np.fromiter(chain.from_iterable(lists), np.uint32, int(offsets[-1])), offsets


def _byte_lengths(parts: dict[str, Any]) -> np.ndarray | None:
    """For byte-level BPE: each character of a token stands for a byte."""
    model, normalizer = parts["model"], parts["normalizer"]
    affixes = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    plain = model["type"] == "BPE" and not any(model.get(affix) for affix in affixes)
    if not plain or not _is_byte_level(parts["pre_tokenizer"]) or (normalizer and normalizer["type"] not in ("NFC",)):
        return None
    lengths = {index: len(token) for token, index in model["vocab"].items()}
    lengths |= {token["id"]: len(token["content"].encode()) for token in parts["added_tokens"]}
    table = np.zeros(max(lengths) + 1, np.int64)
    table[list(lengths)] = list(lengths.values())
    return table


def _is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return any(step["type"] == "ByteLevel" for step in steps)


def _tokenizers(json: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json)


def _fastokens(json: str) -> Any:
    # Units are made side by side in processes: threads on top of them only get in each other's way.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    from fastokens import Tokenizer

    return Tokenizer.from_json_str(json)
