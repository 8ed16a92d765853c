"""What is measured is never trained on: the questions of the probes, and long runs of words out of them."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from controlllm.data.decontaminate import Contamination
from controlllm.data.keys import prompt_key, prompt_keys
from controlllm.data.types import Documents
from controlllm.fingerprint import content_of

Mode = Literal["exact", "ngram", "none"]


class HeldOut:
    """The benchmark items that a mix must not hold."""

    def __init__(self, keys: np.ndarray, contamination: Contamination | None = None):
        self.keys, self.contamination = np.unique(keys), contamination

    @classmethod
    def of(cls, items: Iterable[dict[str, Any]], *, mode: Mode, words: int) -> "HeldOut | None":
        """From probe items, each with `messages`, `text` or `prompt`."""
        if mode == "none":
            return None
        items = list(items)
        keys = np.array([prompt_key(_document(item)) for item in items], np.uint64)
        runs = Contamination.of((_question(item) for item in items), words=words) if mode == "ngram" else None
        return cls(keys, runs)

    @classmethod
    def load(cls, folder: Path) -> "HeldOut | None":
        """What `save` wrote; None when nothing is held out."""
        if not (folder / "keys.npy").exists():
            return None
        runs = folder / "runs.npy"
        return cls(np.load(folder / "keys.npy"), Contamination.load(runs) if runs.exists() else None)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "keys.npy", self.keys)
        if self.contamination is not None:
            self.contamination.save(folder / "runs.npy")

    @cached_property
    def fingerprint(self) -> str:
        runs = self.contamination.hashes.tolist() if self.contamination else None
        return content_of([self.keys.tolist(), runs])

    def hits(self, documents: Documents) -> np.ndarray:
        """(documents,) which of them ask what is measured."""
        found = np.isin(prompt_keys(documents), self.keys)
        if self.contamination is not None:
            found |= self.contamination.rows(documents)
        return found


def _document(item: dict[str, Any]) -> Any:
    return item.get("messages") or item.get("text") or item["prompt"]


def _question(item: dict[str, Any]) -> str:
    return item["messages"][0]["content"] if "messages" in item else item.get("text") or item["prompt"]
