"""The store of shards, which are named by the hash of everything that can change a token in them.

`<key>.arrow` (and `<key>.validation.arrow`) first, `<key>.json` with counts and hashes last: a shard without it does
not exist. Every file is written under another name, synced and renamed, so that builders on any number of machines can
share a folder; two that make the same shard write the same bytes.
"""

import errno
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from controlllm.data.claims import claimed
from controlllm.data.shard import Facts, file_name
from controlllm.data.shared_folder import SharedFolder, Stored, local_files
from controlllm.errors import UserError
from controlllm.fingerprint import content_of, hash_file, sync

DAY_SECONDS = 86400


class ShardStore:
    """A folder of shards: on this machine, on a shared disk, or an fsspec URI (`s3://bucket/shards`)."""

    def __init__(self, root: str | Path):
        self.remote = SharedFolder(str(root)) if "://" in str(root) else None
        self.folder = _spool(self.remote) if self.remote else Path(root)
        self.folder.mkdir(parents=True, exist_ok=True)

    def facts(self, key: str) -> Facts | None:
        """Counts and hashes of a complete shard, or None. Raises UserError when its JSON is damaged."""
        facts = self.described(key)
        files = facts["files"].items() if facts else ()
        return facts if all(self._is_whole(key, kind, made) for kind, made in files) else None

    def described(self, key: str) -> Facts | None:
        """As `facts`, whether or not the shard's files are still there; they are not brought here."""
        file = self.folder / f"{key}.json"
        if self.remote and not file.exists():
            if self.remote.size(file.name) is None:
                return None
            self._fetch(file.name)
        try:
            return _unsealed(file.read_bytes(), self.place(file.name))
        except FileNotFoundError:
            return None
        except UserError:
            if self.remote:  # a copy, which must not outlive its removal there
                file.unlink(missing_ok=True)
            raise

    def _is_whole(self, key: str, kind: str, made: Facts) -> bool:
        """A shard that was removed or cut off since is made again."""
        size = file.stat().st_size if (file := self.folder / file_name(key, kind)).exists() else None
        if self.remote and size != made["size"]:
            file.unlink(missing_ok=True)
            size = self.remote.size(file.name)
        return size == made["size"]

    def place(self, name: str) -> str:
        """What a person is told of a file."""
        return f"{self.remote or self.folder}/{name}"

    def path(self, key: str, kind: str = "train") -> Path:
        """The file on this machine, brought here if it is not. Raises UserError when other bytes arrive."""
        file = self.folder / file_name(key, kind)
        if self.remote and not file.exists() and (facts := self.described(key)):
            self._fetch(file.name, facts["files"][kind]["hash"])
        return file

    @contextmanager
    def writing(self, key: str) -> Iterator[Path | None]:
        """A folder to write `file_name(kind=...)` files into; None when another builder makes this shard now.

        Raises UserError when there is no room for it, or when the folder is there to be read only.
        """
        try:
            with claimed(self.folder / f".{key}.claim") as mine:
                if not mine:
                    yield None
                    return
                with tempfile.TemporaryDirectory(dir=self.folder, prefix=f".{key}.") as partial:
                    yield Path(partial)
        except OSError as error:
            raise _unwritten(self.folder, error) from None

    def publish(self, key: str, partial: Path, facts: Facts) -> None:
        """Make the shard visible, whole."""
        names = [file_name(key, kind) for kind in facts["files"]]
        (partial / f"{key}.json").write_text(json.dumps(facts | {"seal": content_of(facts)}))
        for name in (*names, f"{key}.json"):
            sync(partial / name)
            if self.remote:
                self.remote.put(partial / name)
            os.replace(partial / name, self.folder / name)
        sync(self.folder)

    def files(self) -> dict[str, Stored]:
        """Every file of the store by name, those of half-removed shards too."""
        return self.remote.files() if self.remote else local_files(self.folder)

    def keys(self) -> list[str]:
        """Of every shard."""
        return sorted(name.removesuffix(".json") for name in self.files() if name.endswith(".json"))

    def hash_of(self, key: str, kind: str) -> str | None:
        """Of the bytes that lie in the store, each read again; None where there is no such file."""
        name = file_name(key, kind)
        if self.remote:
            return self.remote.hash_of(name)
        return hash_file(self.folder / name) if (self.folder / name).exists() else None

    def remove(self, key: str) -> None:
        """First what makes it visible."""
        for name in (f"{key}.json", file_name(key, "train"), file_name(key, "validation")):
            if self.remote and self.remote.size(name) is not None:
                self.remote.remove(name)
            (self.folder / name).unlink(missing_ok=True)

    def _fetch(self, name: str, wanted: str | None = None) -> None:
        """Under its name when it is whole, so that other processes of this machine never see half of it."""
        assert self.remote is not None
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".fetch.") as partial:
            file = Path(partial) / name
            for _ in range(2):  # bytes may be damaged on the way
                with file.open("wb") as stream:
                    stream.writelines(self.remote.blocks(name))
                if wanted in (None, hash_file(file)):
                    os.replace(file, self.folder / name)
                    return
        raise UserError(f"{self.place(name)}: what arrives is not what was written; remove it and run again")

    def used(self, key: str) -> None:
        """Young again: what is used is not pruned. Nothing happens where this folder cannot be written."""
        file = self.folder / f"{key}.json"
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > DAY_SECONDS:
                os.utime(file)


def _unsealed(text: bytes, place: str) -> Facts:
    """The facts, if they are what was written to the last character."""
    try:
        facts = json.loads(text)
    except ValueError:  # no JSON, or no UTF-8
        facts = None
    if not isinstance(facts, dict) or facts.pop("seal", None) != content_of(facts):
        raise UserError(f"{place}: damaged; remove it and run again")
    return facts


def _unwritten(folder: Path, error: OSError) -> Exception:
    """What to say of a shard that could not be written; the error itself where it is not the folder's."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        why = f"no room for a shard ({os.strerror(error.errno)}); free some, or set CONTROLLLM_SHARDS to another folder"
        return UserError(f"{folder}: {why}, and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and Path(error.filename or "").parent == folder:
        return UserError(f"{folder}: lacks shards and is not writable; set CONTROLLLM_SHARDS to a folder that is")
    return error


def _spool(remote: SharedFolder) -> Path:
    """Where shards of a remote store lie on this machine."""
    from controlllm.store import store_root

    return store_root() / "shards-of" / xxhash.xxh3_64_hexdigest(str(remote).encode())
