"""The folder of a stage's output: its lineage, what it holds, and whether that is still what was written."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlllm.errors import UserError
from controlllm.fingerprint import digest, hash_file

LINEAGE = "lineage.json"


def store_root() -> Path:
    """`CONTROLLLM_CACHE`, or `.controlllm` beside the place where the command is run."""
    return Path(os.environ.get("CONTROLLLM_CACHE", ".controlllm")).absolute()


def find_lineage(path: Path) -> dict[str, Any] | None:
    """The lineage of a stage output, or None for any other folder."""
    try:
        return json.loads((path / LINEAGE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise UserError(f"{path / LINEAGE}: is damaged ({error.msg}); remove {path} and run again") from None


def read_lineage(path: Path) -> dict[str, Any]:
    """The lineage of a stage output; UserError when the folder is not one."""
    if (lineage := find_lineage(path)) is None:
        raise UserError(f"{path}: has no {LINEAGE}; give a folder that a controlllm stage made")
    return lineage


def find_output(stage: str, content: str, *, near: Path) -> Path | None:
    """The stage's output that holds this: in the store, or in the one that `near` lies in."""
    for store in dict.fromkeys((store_root(), *near.resolve().parents)):
        for folder in sorted((store / stage.replace(" ", "-")).glob("[!.]*")):
            if (find_lineage(folder) or {}).get("content") == content:
                return folder
    return None


def content_hash(path: Path) -> str:
    """What a folder holds, whatever its place and time: names, sizes and hashes of its files.

    A folder of the store carries the answer; files that were touched since are read again.
    """
    stored = find_lineage(path)
    if stored is not None and all(unchanged(path / name, stamp) for name, stamp in stored["files"].items()):
        return stored["content"]
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    return content_of_files(files_of(path))


def unchanged(file: Path, stamp: dict[str, Any]) -> bool:
    """Whether a file is still what its stamp says: by time and size, or else by its bytes."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return False
    if status.st_size != stamp["size"]:
        return False
    return status.st_mtime_ns == stamp["mtime_ns"] or hash_file(file) == stamp["hash"]


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size, time and hash of every file but the lineage, by name."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != LINEAGE)
    return {
        f.relative_to(folder).as_posix(): {
            "size": f.stat().st_size,
            "mtime_ns": f.stat().st_mtime_ns,
            "hash": hash_file(f),
        }
        for f in files
    }


def content_of_files(files: dict[str, dict[str, Any]]) -> str:
    """One hash of names, sizes and hashes."""
    return digest(json.dumps([[name, stamp["size"], stamp["hash"]] for name, stamp in sorted(files.items())]))


def ancestors_of(parents: Mapping[str, Path]) -> dict[str, Any]:
    """Lineages by `stage/key`, so that an output can be followed to its roots wherever it is copied.

    A benchmark stands for its tasks.
    """
    found: dict[str, Any] = {}
    for path in parents.values():
        lineage = find_lineage(path)
        if lineage and lineage["stage"] != "benchmark task":
            found |= lineage.get("ancestors", {})
            found[f"{lineage['stage']}/{lineage['key']}"] = without(lineage, "files", "ancestors")
    return found


def without(lineage: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """All but these of its values."""
    return {name: value for name, value in lineage.items() if name not in names}
