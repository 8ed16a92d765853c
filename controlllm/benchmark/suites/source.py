"""Where a task's data come from: a folder of datasets, or the Hub and its cache."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controlllm.benchmark.code import packaged_data
from controlllm.errors import UserError

SAVED = ("dataset_dict.json", "state.json")
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
PART = re.compile(r"-\d{5}-of-\d{5}$")


def splits_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The splits that lm-eval reads for a task: the items, and where its examples come from."""
    shown = config.get("fewshot_config") or {}
    items = config.get("test_split") or config.get("validation_split")
    examples = config.get("fewshot_split") or shown.get("split")
    if not examples and not shown.get("samples"):
        examples = config.get("training_split") or config.get("validation_split")
    return tuple(dict.fromkeys(split for split in (items, examples) if split))


@dataclass(frozen=True)
class Source:
    """A dataset of a task, in the form that lm-eval calls for one: all its splits, when called."""

    path: str
    name: str | None = None
    folder: str | None = None
    splits: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.path} ({self.name})" if self.name else self.path

    def __call__(self, **_: Any) -> Any:
        """A datasets.DatasetDict. UserError where it, or a split, cannot be had."""
        if (file := packaged_data(self.path)) and not (self.folder and (Path(self.folder) / self.path).is_dir()):
            return _packaged(file)
        found = self._local(Path(self.folder)) if self.folder else self._hub()
        if missing := [split for split in self.splits if split not in found]:
            has = ", ".join(found) or "none"
            raise UserError(f"{self._where()}: the split '{missing[0]}' of {self} is missing; it has {has}")
        return found

    def _where(self) -> str:
        return f"benchmark.data: {self.folder}" if self.folder else "the Hub"

    def _local(self, folder: Path) -> Any:
        from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
        from datasets.exceptions import DatasetsError

        place, name = _place(folder / self.path, self.name)
        if place is None:
            subset = f"/{self.name}" if self.name else ""
            raise UserError(
                f"benchmark.data: {folder} has no dataset {self}; put it there as {self.path}{subset} (the Hub's "
                "files, what save_to_disk writes, or parquet or jsonl named by split), or leave benchmark.data out"
            )
        if any((place / saved).is_file() for saved in SAVED):
            saved = load_from_disk(str(place))
            return DatasetDict({str(saved.split or "test"): saved}) if isinstance(saved, Dataset) else saved
        try:
            files = {} if name else _by_split(place)
            if set(self.splits) & set(files):  # load_dataset alone would call a split dev validation
                return load_dataset(READERS[Path(next(iter(files.values()))[0]).suffix], data_files=files)
            return load_dataset(str(place), name=name)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise UserError(f"{place}: cannot be read as a dataset: {_said(error)}") from error

    def _hub(self) -> Any:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            return load_dataset(self.path, name=self.name, **self.options)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise UserError(
                f"the dataset {self} cannot be had from the Hub or its cache ({_said(error)}); let this machine reach "
                f"the Hub once (HF_TOKEN if gated), or put it into a folder as {self.path} and set benchmark.data"
            ) from error


def _packaged(file: Path) -> Any:
    from datasets import load_dataset

    return load_dataset("json", data_files={"test": str(file)})


def _place(folder: Path, name: str | None) -> tuple[Path | None, str | None]:
    """The folder to load, and the configuration to ask for where a snapshot's README describes several."""
    if name and (folder / name).is_dir() and not _described(folder, name):
        return folder / name, None
    if not folder.is_dir():
        return None, None
    if name:
        return (folder, name) if _described(folder, name) else (None, None)
    return folder, None


def _described(folder: Path, name: str | None) -> bool:
    """Whether the dataset's card names the files of this configuration, as load_dataset reads it."""
    import yaml

    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if not text.startswith("---"):
        return False
    try:
        facts = yaml.safe_load(text.split("---")[1])
    except yaml.YAMLError as error:
        raise UserError(f"{card}: its header is not YAML ({str(error).splitlines()[0]})") from None
    configs = (facts or {}).get("configs") or []
    return any(name is None or config.get("config_name") == name for config in configs)


def _by_split(place: Path) -> dict[str, list[str]]:
    """`test.jsonl`, `dev-00000-of-00001.parquet`, there or in `data/`: {split: files}."""
    files: dict[str, list[str]] = {}
    for file in sorted((*place.iterdir(), *place.glob("data/*"))):
        if file.suffix in READERS:
            files.setdefault(PART.sub("", file.stem), []).append(str(file))
    return files


def _said(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
