"""Hashes of documents, for every choice that must stay the same when rows are added: split, share, duplicates."""

import json
from itertools import chain

import numpy as np
import xxhash

from controlllm.data.types import Document, Documents

# Odd numbers with well-mixed bits, as in splitmix64: multiplication by them loses nothing.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def content_keys(documents: Documents) -> np.ndarray:
    """(documents,) uint64: equal for equal documents, whatever they were read from."""
    hashes = np.fromiter(map(_hash, documents.contents), np.uint64, len(documents.contents))
    # The n-th content of a document counts with the n-th power, so that order matters.
    counts = np.diff(documents.offsets)
    place = np.arange(len(hashes)) - np.repeat(documents.offsets[:-1], counts)
    weighted = mixed(hashes + _STEP * (place + 1).astype(np.uint64))
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(weighted, dtype=np.uint64)))
    roles = np.asarray([_hash(json.dumps(roles)) for roles in documents.shapes], np.uint64)
    keys = mixed(sums[documents.offsets[1:]] - sums[documents.offsets[:-1]] + roles[documents.shape])
    for index, document in documents.whole.items():
        keys[index] = _hash(json.dumps(document, sort_keys=True, ensure_ascii=False))
    return keys


def content_key(document: Document) -> int:
    """The key of one document, as in `content_keys`."""
    return int(content_keys(Documents.of([document], np.zeros(1, np.int64)))[0])


def prompt_keys(documents: Documents) -> np.ndarray:
    """(documents,) uint64: of the first user message, or of the text; case and white space do not count."""
    first = np.asarray([roles.index("user") if "user" in roles else 0 for roles in documents.shapes], np.int64)
    prompts = [documents.contents[place] for place in _plain_places(documents, first)]
    keys = np.zeros(len(documents), np.uint64)
    plain = np.diff(documents.offsets) > 0
    keys[plain] = np.fromiter(map(_prompt_hash, prompts), np.uint64, len(prompts))
    for index, document in documents.whole.items():
        keys[index] = prompt_key(document)
    return keys


def prompt_key(document: Document) -> int:
    """The key of one document, as in `prompt_keys`; without a user message, of its first message."""
    if isinstance(document, str):
        return _prompt_hash(document)
    messages = document["messages"] if isinstance(document, dict) else document
    prompt = next((message for message in messages if message["role"] == "user"), messages[0])
    return _prompt_hash(prompt["content"])


def in_share(keys: np.ndarray, share: float, salt: str) -> np.ndarray:
    """(keys,) bool: a share of the keys. A larger share holds the smaller one; another salt chooses independently."""
    with np.errstate(over="ignore"):
        drawn = mixed(keys + np.uint64(_hash(salt)))
    return (drawn >> np.uint64(11)) * 2.0**-53 < share  # 53 bits: all that a float can tell apart


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 with its bits mixed; no two values become one."""
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))


def texts_of(document: Document) -> list[str]:
    """The contents of a document, in order."""
    if isinstance(document, str):
        return [document]
    messages = document["messages"] if isinstance(document, dict) else document
    return [message["content"] for message in messages]


def all_texts(documents: Documents) -> tuple[list[str], np.ndarray]:
    """The contents of all documents, whole ones after the others, and (texts,) the document of each."""
    owners = np.repeat(np.arange(len(documents)), np.diff(documents.offsets))
    if not documents.whole:
        return documents.contents, owners
    others = [(index, text) for index, document in documents.whole.items() for text in texts_of(document)]
    texts = list(chain(documents.contents, (text for _, text in others)))
    return texts, np.concatenate((owners, np.asarray([index for index, _ in others], np.int64)))


def _plain_places(documents: Documents, first: np.ndarray) -> list[int]:
    places = documents.offsets[:-1] + first[documents.shape]
    return places[np.diff(documents.offsets) > 0].tolist()


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def _prompt_hash(text: str) -> int:
    return _hash(" ".join(text.split()).lower())
