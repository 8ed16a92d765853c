"""Is a checkpoint's folder fit to be shared: complete, unchanged, only safetensors, nothing private in its texts?"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from controlllm.errors import UserError
from controlllm.fingerprint import hash_file
from controlllm.private import SHAPES
from controlllm.progress import track
from controlllm.store import LINEAGE, find_lineage
from controlllm.whole import check_whole

_ENDINGS = {".safetensors", ".json", ".jinja", ".model", ".txt", ".md"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"}
_LICENCES = ("LICENSE", "NOTICE")
_LARGEST_TEXT = 1 << 20
"""Bytes; a larger JSON file is a vocabulary, in which anything can stand."""

# A path of a machine has a place that people or jobs write to at its beginning; `/n/` of a template has not.
_PATH = re.compile(
    r"(?<![\w.:/-])(/(?:home|root|Users|tmp|var|mnt|data|opt|srv|scratch|workspace|work|media|content|kaggle|gpfs|lustre|"
    r"nfs|fsx|efs|private|local|usr|etc)/[^\s'\"`]+|[A-Za-z]:\\\\?[\w.-]+\\[^\s'\"`]+|file://[^\s'\"`]+|~/[\w.-]+/[^\s'\"`]*)"
)


@dataclass(frozen=True)
class File:
    """A file of the folder, to be sent as `name`; a link is followed."""

    name: str
    path: Path
    size: int


def shared_files(folder: Path) -> list[File]:
    """What is sent of the folder, by name: all but our own lineage.json and README.md, which is made anew.

    Raises UserError with the first reason why it must not be.
    """
    files = list(_files(folder))
    for file in files:
        if file.path.suffix in _PICKLES:
            raise UserError(f"{folder / file.name}: may be a pickle, which can run code; send safetensors only")
        if file.path.suffix not in _ENDINGS and not file.name.startswith(_LICENCES):
            raise UserError(f"{folder / file.name}: is no part of a checkpoint; move it elsewhere, then push again")
    check_whole(folder, {file.name: file.path for file in files})
    for file in files:
        if file.path.suffix != ".safetensors" and file.size <= _LARGEST_TEXT:
            check_text(file.path.read_text(encoding="utf-8", errors="replace"), str(folder / file.name))
    _unchanged(folder, files)
    return files


def check_text(text: str, where: str) -> None:
    """Raises UserError for a path of a machine or a secret in it; the secret itself is not repeated."""
    for what, pattern in SHAPES.items():
        if re.search(pattern, text):
            raise UserError(f"{where}: holds {what}; remove it, and make a new one, since this one was written down")
    if found := _PATH.search(text):
        raise UserError(f"{where}: holds a path of a machine, {found.group(1)[:80]}; remove it, then push again")


def _files(folder: Path) -> Iterator[File]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name in (LINEAGE, "README.md"):
            continue
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            raise UserError(f"{path}: is hidden and no part of a checkpoint; move it elsewhere, then push again")
        if not path.is_file():
            raise UserError(f"{path}: is a link to nothing, or no plain file; make the checkpoint again")
        yield File(name, path.resolve(), path.stat().st_size)


def _unchanged(folder: Path, files: list[File]) -> None:
    """Every byte against the stage's own record, where there is one."""
    if (lineage := find_lineage(folder)) is None:
        return
    recorded = {name: stamp["hash"] for name, stamp in lineage["files"].items()}
    here = {file.name for file in files} | {"README.md"}
    if missing := sorted(set(recorded) - here):
        raise UserError(f"{folder / missing[0]}: is missing; run controlllm consolidate again")
    with track("verify", total=max(sum(file.size for file in files), 1)) as advance:
        done = 0
        for file in files:
            if recorded.get(file.name) != hash_file(file.path):
                raise UserError(
                    f"{folder / file.name}: is not what the stage wrote; run controlllm consolidate again, or push a "
                    f"copy without {LINEAGE} if the change is meant"
                )
            done += file.size
            advance(done, file.name)
