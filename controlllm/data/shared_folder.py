"""A folder on another machine that holds shards: its files by name, written so that none is ever seen half-written."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from controlllm.data.location import file_system
from controlllm.data.remote import PIECE_BYTES, info_of, read_range, told

OBJECT_STORES = ("s3://", "gs://")


class Stored(NamedTuple):
    """A file as it lies in a store of shards."""

    size: int
    made: float
    """Seconds since 1970."""


def local_files(folder: Path) -> dict[str, Stored]:
    """As `SharedFolder.files`, of a folder here."""
    found: dict[str, Stored] = {}
    for entry in os.scandir(folder):
        if not entry.name.startswith("."):
            with suppress(FileNotFoundError):  # removed since
                found[entry.name] = Stored(entry.stat().st_size, entry.stat().st_mtime)
    return found


class SharedFolder:
    """An fsspec URI such as `s3://bucket/shards`; every method raises UserError where the server cannot be reached."""

    def __init__(self, uri: str):
        self.uri = uri.rstrip("/")

    def __str__(self) -> str:
        return self.uri

    def size(self, name: str) -> int | None:
        """None where there is no such file."""
        info = info_of(f"{self.uri}/{name}")
        return None if info is None else int(info["size"])

    def files(self) -> dict[str, Stored]:
        """By name; those that are being written are left out."""
        with told(self.uri):
            system, path = file_system(self.uri)
            try:
                found = system.ls(path, detail=True)
            except FileNotFoundError:
                return {}
        named = ((info["name"].rstrip("/").rpartition("/")[2], info) for info in found if info["type"] == "file")
        return {name: Stored(int(info["size"]), _made(info)) for name, info in named if name[:1] not in ("", ".")}

    def blocks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, each read tried again where that may help."""
        uri, size = f"{self.uri}/{name}", self.size(name) or 0
        for start in range(0, size, PIECE_BYTES):
            yield read_range(uri, start, min(start + PIECE_BYTES, size))

    def hash_of(self, name: str) -> str | None:
        """As `hash_file`; None where there is no such file."""
        if self.size(name) is None:
            return None
        digest = xxhash.xxh3_128()
        for block in self.blocks(name):
            digest.update(block)
        return digest.hexdigest()

    def put(self, file: Path) -> None:
        """Under its final name at once on object stores, where a half-written object is never seen; by rename else."""
        with told(f"{self.uri}/{file.name}"):
            system, path = file_system(self.uri)
            if self.uri.startswith(OBJECT_STORES):
                system.put_file(str(file), f"{path}/{file.name}")
                return
            system.makedirs(path, exist_ok=True)
            temporary = f"{path}/.{file.parent.name}.{file.name}"
            system.put_file(str(file), temporary)
            there = self.size(file.name)
            if there == file.stat().st_size:  # another builder was faster: the same bytes
                system.rm_file(temporary)
                return
            if there is not None:  # cut off
                system.rm_file(f"{path}/{file.name}")
            system.mv(temporary, f"{path}/{file.name}")

    def remove(self, name: str) -> None:
        with told(f"{self.uri}/{name}"):
            system, path = file_system(self.uri)
            system.rm_file(f"{path}/{name}")


def _made(info: dict[str, Any]) -> float:
    """Each library has its own name and unit for it; a file without a time counts as new."""
    value = next((info[key] for key in ("LastModified", "mtime", "modificationTime") if info.get(key)), time.time())
    if isinstance(value, datetime):
        return value.timestamp()
    return value / 1000 if value > 1e11 else float(value)
