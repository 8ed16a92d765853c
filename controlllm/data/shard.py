"""Shards: immutable Arrow files of packed rows, named by the hash of everything that can change a token in them.

`<key>.arrow` (and `<key>.validation.arrow`) first, `<key>.json` with counts and hashes last: a shard without it does
not exist. Every file is written under another name, synced and renamed, so that builders on any number of machines can
share a folder; two that make the same shard write the same bytes.
"""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from controlllm.data.claims import claimed
from controlllm.data.shared_folder import SharedFolder, Stored, local_files
from controlllm.errors import UserError
from controlllm.fingerprint import content_of, hash_file, sync

BATCH_ROWS = 64
"""Packed rows in one record batch: what is read, and checked against its hash, at a time."""
Facts = dict[str, Any]


def id_type(vocabulary: int) -> type[np.unsignedinteger[Any]]:
    """Two bytes for a token where they are enough."""
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


class ShardWriter:
    """Packed rows into one Arrow file: ids, which of them are targets, and per document its length and source row."""

    def __init__(self, file: Path, *, vocabulary: int):
        self.dtype = id_type(vocabulary)
        ids = pa.uint16() if self.dtype == np.uint16 else pa.uint32()
        columns = {"input_ids": ids, "target": pa.bool_(), "lengths": pa.int32(), "rows": pa.int64()}
        self.schema = pa.schema([(name, pa.list_(pa.field("item", kind, False))) for name, kind in columns.items()])
        self.file = file
        self.sink = pa.OSFile(str(file), "wb")
        self.writer = pa.ipc.new_file(self.sink, self.schema)
        self.hashes: list[str] = []
        self.bins = self.documents = self.tokens = self.targets = 0

    def write(
        self, ids: np.ndarray, target: np.ndarray, lengths: np.ndarray, rows: np.ndarray, bins: np.ndarray
    ) -> None:
        """Documents end to end in the order of the bins; `bins` (bins + 1,) says which documents each bin holds.

        ids, target: (tokens,) · lengths, rows: (documents,)
        """
        ends = np.concatenate([[0], np.cumsum(lengths)])
        for start in range(0, len(bins) - 1, BATCH_ROWS):
            edges = bins[start : start + BATCH_ROWS + 1]
            documents, tokens = slice(edges[0], edges[-1]), slice(ends[edges[0]], ends[edges[-1]])
            of_tokens, of_documents = _offsets(ends[edges]), _offsets(edges)
            columns = (
                (of_tokens, ids[tokens].astype(self.dtype)),
                (of_tokens, target[tokens]),
                (of_documents, lengths[documents].astype(np.int32)),
                (of_documents, rows[documents].astype(np.int64)),
            )
            lists = [_lists(kind, *column) for kind, column in zip(self.schema.types, columns, strict=True)]
            batch = pa.record_batch(lists, schema=self.schema)
            self.writer.write_batch(batch)
            self.hashes.append(batch_hash(batch))
        self.bins += len(bins) - 1
        self.documents += len(lengths)
        self.tokens += int(ends[-1])
        self.targets += int(target.sum())

    def close(self) -> Facts:
        """Counts, and what the file is checked against."""
        self.writer.close()
        self.sink.close()
        counts = {name: getattr(self, name) for name in ("bins", "documents", "tokens", "targets")}
        return counts | {"size": self.file.stat().st_size, "hash": hash_file(self.file), "batches": self.hashes}


def _offsets(edges: np.ndarray) -> np.ndarray:
    return (edges - edges[0]).astype(np.int32)


def _lists(kind: pa.ListType, offsets: np.ndarray, values: np.ndarray) -> pa.Array:
    """Of the arrays' own memory; `pa.array` would do it, and import pandas to find that these are none of its."""
    bits = np.packbits(values, bitorder="little") if values.dtype == bool else values
    inner = pa.Array.from_buffers(kind.value_type, len(values), [None, pa.py_buffer(bits)])
    return pa.Array.from_buffers(kind, len(offsets) - 1, [None, pa.py_buffer(offsets)], children=[inner])


def batch_hash(batch: pa.RecordBatch) -> str:
    """Of the bytes of every column; the same for a batch in memory and for one in a mapped file."""
    digest = xxhash.xxh3_64()
    for column in batch.columns:
        for array in (column.offsets, column.values):
            data = array.buffers()[1]
            bits = len(array) * (1 if pa.types.is_boolean(array.type) else array.type.bit_width)
            digest.update(memoryview(data)[: bits // 8])
            if bits % 8:  # what lies beyond the last bit is nobody's
                digest.update(bytes([data[bits // 8] & ((1 << bits % 8) - 1)]))
    return digest.hexdigest()


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
        file = self.folder / file_name(key, kind)
        size = file.stat().st_size if file.exists() else None
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


def file_name(key: str, kind: str) -> str:
    return f"{key}.arrow" if kind == "train" else f"{key}.{kind}.arrow"


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
