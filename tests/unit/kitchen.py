"""A folder in which `controlllm prepare` is run in this process, on data and models that may be bad."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_data import RECIPE

from controlllm.cli import main
from controlllm.data.shard import file_name
from controlllm.data.shard_store import ShardStore
from controlllm.data.shelf import Shelf


@dataclass
class Kitchen:
    """A folder with a recipe and data in which `controlllm prepare` is run."""

    folder: Path
    store: Path
    capsys: pytest.CaptureFixture[str]

    def write(self, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            file = self.folder / "data" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    def recipe(self, source: str, format: str, model: Path) -> None:
        where = source if "://" in source else f"data/{source}"
        text = RECIPE.format(source=json.dumps(where), format=format, model=model)
        (self.folder / "bad.yaml").write_text(text)

    def prepare(self, *changes: str) -> dict[str, Any]:
        """Counts of a run that must succeed."""
        assert main(["prepare", "bad.yaml", *changes]) == 0, self.capsys.readouterr().err
        assert "error" not in self.capsys.readouterr().err
        return json.loads(self.made("stats.json").read_text())

    def refused(self, *changes: str) -> str:
        """The one line of a run that must fail, and leaves nothing that could be taken for its output."""
        assert main(["prepare", "bad.yaml", *changes]) == 1
        printed = self.capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, printed.err
        assert printed.err.splitlines()[-1] == errors[0]
        assert "Traceback" not in printed.err
        assert "HUSH" not in printed.err + printed.out
        assert not [folder for folder in self.outputs() if folder.is_dir()]
        self._shards_are_whole()
        return errors[0].removeprefix("error: ")

    def _shards_are_whole(self) -> None:
        shards = ShardStore(self.store / "shards")
        found = {key: shards.facts(key) for key in shards.keys()}  # noqa: SIM118 - no dictionary
        assert all(found.values()), "half a shard"
        whole = {f"{key}.json" for key in found}
        whole |= {file_name(key, kind) for key, facts in found.items() if facts for kind in facts["files"]}
        assert {file.name for file in (self.store / "shards").iterdir() if file.suffix != ".claim"} == whole

    def outputs(self) -> Iterator[Path]:
        return (self.store / "prepare").glob("*")

    def made(self, name: str) -> Path:
        """A file of the newest output."""
        return max(self.outputs(), key=lambda folder: folder.stat().st_mtime_ns if folder.is_dir() else 0) / name

    def texts(self, kind: str = "train") -> list[str]:
        """What the packed documents of the newest output say."""
        from transformers import AutoTokenizer

        (base,) = (folder for folder in (self.store / "ingest-model").iterdir() if folder.is_dir())
        tokenizer = AutoTokenizer.from_pretrained(base)
        shelf, texts = Shelf.open(self.made("own")), []
        for unit in range(shelf.units):
            for number in range(shelf.rows_of(unit, kind)):
                row = shelf.read(unit, number, kind)
                texts += [tokenizer.decode(ids) for ids in np.split(row["input_ids"], np.cumsum(row["lengths"])[:-1])]
        return texts

    def holds(self, words: bytes) -> list[Path]:
        """Files of the store in which they stand."""
        return [file for file in self.store.rglob("*") if file.is_file() and words in file.read_bytes()]

    def quarantine(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.made("quarantine.jsonl").read_text().splitlines()]


@pytest.fixture
def kitchen(tmp_path, store, monkeypatch, capsys) -> Kitchen:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTROLLLM_WORKERS", "1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "HUSH")
    return Kitchen(tmp_path, store, capsys)


def contains(said: str, says: str) -> None:
    for fragment in says.split(" ... "):
        assert fragment in said, said
