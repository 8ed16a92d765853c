"""A checkpoint as files: a folder `step-00000123` of shards and a manifest that tells each file's size and hash.

A folder of the disk: written under another name, synced, renamed. Nothing under the final name is ever half-written,
and what became of it later is found out before it is read.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from controlllm.errors import UserError
from controlllm.fingerprint import content_of, hash_file, sync
from controlllm.train.distributed import World

MANIFEST = "manifest.json"
FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})")


class Damaged(Exception):
    """Not what was written; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is of."""

    step: int
    state: dict[str, Any]
    identity: dict[str, Any]
    processes: int
    """That wrote it; any number can read it."""
    best: bool
    files: dict[str, list[Any]]
    """Size and xxh3-128 by name."""

    def dump(self) -> bytes:
        """With a hash over all of it, in the one spelling that `parse` accepts."""
        facts = {"format": FORMAT} | asdict(self)
        return _spelled(facts | {"seal": content_of(facts)})

    @classmethod
    def parse(cls, text: bytes, *, step: int) -> "Manifest":
        """Raises Damaged unless every byte is as it was written, for this step."""
        try:
            facts = json.loads(text)
        except ValueError:
            raise Damaged(f"{MANIFEST} is no JSON") from None
        if not isinstance(facts, dict) or _spelled(facts) != text:
            raise Damaged(f"{MANIFEST} was altered")
        if facts.get("format", FORMAT) != FORMAT:
            raise Damaged(f"{MANIFEST} has format {facts['format']}, this version reads {FORMAT}")
        seal = facts.pop("seal", None)
        if seal != content_of(facts):
            raise Damaged(f"{MANIFEST} was altered: its seal does not fit")
        del facts["format"]
        if facts["step"] != step:
            raise Damaged(f"{MANIFEST} is of step {facts['step']}")
        return cls(**facts)


def _spelled(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, indent=1, sort_keys=True).encode()


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_numbers(names: Iterable[str]) -> list[int]:
    """The steps among names, ascending."""
    found = (_STEP.fullmatch(name) for name in names)
    return sorted(int(match[1]) for match in found if match and step_name(int(match[1])) == match[0])


def verify(folder: Path, manifest: Manifest) -> None:
    """Raises Damaged unless the folder holds the manifest's files, byte for byte, and nothing else."""
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged("is no folder")
    entries = {entry.name: entry for entry in os.scandir(folder) if entry.name != MANIFEST}
    if odd := sorted(entries.keys() ^ manifest.files.keys()):
        raise Damaged(f"{odd[0]} " + ("is missing" if odd[0] in manifest.files else "does not belong to it"))
    for name, (size, _) in manifest.files.items():
        if not entries[name].is_file(follow_symlinks=False):
            raise Damaged(f"{name} is no plain file")
        if (found := entries[name].stat().st_size) != size:
            raise Damaged(f"{name} has {found} bytes instead of {size}")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = pool.map(lambda name: hash_file(folder / name), manifest.files)
        for (name, (_, digest)), found in zip(manifest.files.items(), hashes, strict=True):
            if found != digest:
                raise Damaged(f"{name} was altered: its hash does not fit")


class LocalStore:
    """Checkpoints in a folder that all processes share."""

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def place(self, step: int) -> Path:
        return self.root / step_name(step)

    def partial(self, step: int) -> Path:
        """Where the files of a step are written."""
        return self.root / f".{step_name(step)}.partial"

    def steps(self) -> list[int]:
        if not self.root.exists():
            return []
        self._tidy()
        return step_numbers(os.listdir(self.root))

    def manifest(self, step: int) -> Manifest:
        """Raises Damaged."""
        file = self.place(step) / MANIFEST
        if file.is_symlink():
            raise Damaged(f"{MANIFEST} is no plain file")
        try:
            text = file.read_bytes()
        except FileNotFoundError:
            raise Damaged(f"{MANIFEST} is missing") from None
        except (NotADirectoryError, IsADirectoryError):
            raise Damaged("is no folder" if file.parent.is_file() else f"{MANIFEST} is no plain file") from None
        return Manifest.parse(text, step=step)

    def is_fetched_by(self, world: World) -> bool:
        """Whether this process finds and verifies checkpoints for the others."""
        return world.is_main

    def fetch(self, step: int, manifest: Manifest) -> None:
        """It is here already."""

    def release(self, step: int) -> None:
        """It stays."""

    def begin(self, step: int) -> None:
        """Make a fresh folder; by one process only, as all that follows but `deliver`."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._tidy()
        self.partial(step).mkdir()

    def deliver(self, step: int, name: str) -> None:
        """A file is written: see that it lasts."""
        sync(self.partial(step) / name)

    def publish(self, step: int, manifest: Manifest) -> None:
        """Make the step visible, whole."""
        partial, final = self.partial(step), self.place(step)
        (partial / MANIFEST).write_bytes(manifest.dump())
        sync(partial / MANIFEST)
        sync(partial)
        replaced = self.root / f".{final.name}.replaced"
        if os.path.lexists(final):
            final.rename(replaced)
        partial.rename(final)
        sync(self.root)
        _delete(replaced)

    def abandon(self, step: int) -> None:
        """Leave nothing of a step that could not be written."""
        _delete(self.partial(step))

    def remove(self, step: int) -> None:
        """Renamed first, so that a half-removed folder never looks like a checkpoint."""
        removed = self.root / f".{step_name(step)}.removed"
        self.place(step).rename(removed)
        _delete(removed)

    def _tidy(self) -> None:
        """What a killed process left."""
        for path in self.root.glob(".step-*.*"):
            name, _, what = path.name[1:].partition(".")
            if what == "replaced" and not os.path.lexists(self.root / name):
                path.rename(self.root / name)
            elif what in ("partial", "removed", "replaced"):
                _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def told(error: Exception, where: str) -> Exception:
    """What to say of a checkpoint that could not be written; the error itself where it is not the disk's."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        why = f"no room for a checkpoint ({os.strerror(error.errno)})"
        return UserError(f"{where}: {why}; free some, or choose another train.checkpoint.folder, and run it again")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        why = f"cannot be written ({os.strerror(error.errno)})"
        return UserError(f"{where}: {why}; choose another train.checkpoint.folder")
    return error
