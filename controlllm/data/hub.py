"""Data sets of the Hugging Face hub, or in its forms on this machine, as Arrow files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlllm.data.location import list_files
from controlllm.errors import UserError

_FORM = re.compile(r"hf://(?P<path>[^@:#]+)(@(?P<revision>[^:#]+))?(:(?P<config>[^#]+))?(#(?P<split>.+))?", re.DOTALL)


@dataclass(frozen=True)
class HubSource:
    """`hf://org/name@revision:config#split`; the path may be a folder: `hf:///folder#train`, `hf://./folder`.

    `hf://org/name/*.jsonl@revision` names files of a data set as they lie on the hub: for sets with a script or with
    files of several kinds, which `datasets` does not read.
    """

    path: str
    revision: str | None
    config: str | None
    split: str | None

    @property
    def is_folder(self) -> bool:
        return self.path.startswith(("/", "."))

    @property
    def pattern(self) -> str:
        """Of the files on the hub, where the source names files."""
        return "" if self.is_folder else "/".join(self.path.split("/")[2:])

    @classmethod
    def of(cls, source: str) -> "HubSource":
        found = _FORM.fullmatch(source)
        if not found:
            raise UserError(f"{source}: expected hf://org/name and, where needed, @revision, :config, #split")
        made = cls(**{key: found[key] for key in ("path", "revision", "config", "split")})
        if made.split and not re.fullmatch(r"\w+(\.\w+)*", made.split):
            raise UserError(f"{source}: '#{made.split}' must be the name of one split; for a part of it set rows")
        if made.pattern and (made.config or made.split):
            raise UserError(f"{source}: names files, which have no :config and no #split")
        if not made.is_folder and not re.fullmatch(r"[\w.-]+(/[\w.-]+(/.+)?)?", made.path):
            raise UserError(
                f"{source}: '{made.path}' is no name on the hub; a folder is written hf:///folder or hf://./folder"
            )
        return made


def hub_files(source: str) -> list[str]:
    """The Arrow files of one split, from the hub's cache, or downloaded to it where there is a network."""
    found = HubSource.of(source)
    if found.pattern:
        return list_files(f"{_downloaded(source, found)}/{found.pattern}")
    data = _load(source, found)
    if isinstance(data, dict):
        data = _chosen(source, data)
    files = [entry["filename"] for entry in data.cache_files]
    if data._indices is not None or not files:
        raise UserError(f"{source}: was saved as a selection of rows; save it again after flatten_indices()")
    return [str(Path(file).absolute()) for file in files]


def _downloaded(source: str, found: HubSource) -> str:
    """The folder with the files that the source names, from the hub's cache or the hub."""
    from huggingface_hub import snapshot_download

    _quiet()
    name = found.path.removesuffix(f"/{found.pattern}")
    try:
        return snapshot_download(name, repo_type="dataset", revision=found.revision, allow_patterns=found.pattern)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(_reason(source, found, error)) from None


def _load(source: str, found: HubSource) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    _quiet()
    folder = Path(found.path)
    if found.is_folder and not folder.is_dir():
        raise UserError(f"{source}: no such folder")
    try:
        if found.is_folder and any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            data = datasets.load_from_disk(found.path)
            return _chosen(source, data, found.split) if isinstance(data, dict) else data
        return _load_dataset(source, found)
    except UserError:
        raise
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(_reason(source, found, error)) from None


def _quiet() -> None:
    """What goes wrong is told in one line at the end, and not at every try."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


def _load_dataset(source: str, found: HubSource) -> Any:
    import datasets

    builder = datasets.load_dataset_builder(found.path, found.config, revision=found.revision)
    splits = dict.fromkeys(builder.info.splits or ())
    if splits and not found.split:
        _chosen(source, splits)  # before anything is downloaded
    if splits and found.split:
        _chosen(source, splits, found.split)
    return datasets.load_dataset(found.path, found.config, revision=found.revision, split=found.split)


def _chosen(source: str, splits: Mapping[Any, Any], name: str | None = None) -> Any:
    """The split that is named, or the only one."""
    if name is None and len(splits) == 1:
        return next(iter(splits.values()))
    if name not in splits:
        known = ", ".join(splits)
        said = f"has no split '{name}'" if name else "has several splits"
        raise UserError(f"{source}: {said}; name one of {known} as in {source.partition('#')[0]}#{next(iter(splits))}")
    return splits[name]


def _reason(source: str, found: HubSource, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "available configs" in text or "BuilderConfig" in text:
        listed = re.search(r"\[.*?\]", text)
        example = f"hf://{found.path}"
        return f"{source}: has several configurations; name one of {listed[0] if listed else text} as in {example}:name"
    if "scripts are no longer supported" in text or "trust_remote_code" in text:
        return f"{source}: needs code from the hub to be read, which is never run; use a copy of it as Parquet files"
    if "Unknown split" in text:
        return f"{source}: {text[:300]}"
    if found.is_folder:
        return f"{source}: cannot be read as a data set: {text[:300]}"
    fetch = f"`controlllm ingest {source} --to FOLDER` on a machine with network"
    return f"{source}: not in this machine's cache, and the hub cannot give it ({type(error).__name__}); {fetch}"
