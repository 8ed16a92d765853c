"""Shards: immutable Arrow files of packed rows, named by the hash of everything that can change a token in them.

`<key>.arrow` (and `<key>.validation.arrow`) first, `<key>.json` with counts and hashes last: a shard without it does
not exist. Every file is written under another name, synced and renamed, so that builders on any number of machines can
share a folder; two that make the same shard write the same bytes.
"""

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
from controlllm.errors import UserError
from controlllm.fingerprint import hash_file, sync

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
        self.remote = str(root).rstrip("/") if "://" in str(root) else None
        self.folder = _spool(self.remote) if self.remote else Path(root)
        self.folder.mkdir(parents=True, exist_ok=True)

    def facts(self, key: str) -> Facts | None:
        """Counts and hashes of a complete shard, or None."""
        file = self.folder / f"{key}.json"
        if self.remote and not file.exists() and self._exists(file.name):
            self._fetch(file.name)
        try:
            facts = json.loads(file.read_text())
        except FileNotFoundError:
            return None
        except json.JSONDecodeError:
            raise UserError(f"{file}: damaged; remove it and run again") from None
        return facts if all(self._whole(key, kind, made) for kind, made in facts["files"].items()) else None

    def _whole(self, key: str, kind: str, made: Facts) -> bool:
        """A shard that was removed or cut off since is made again."""
        file = self.path(key, kind)
        return file.exists() and file.stat().st_size == made["size"]

    def path(self, key: str, kind: str = "train") -> Path:
        """The file on this machine, brought here if it is not."""
        file = self.folder / file_name(key, kind)
        if self.remote and not file.exists() and self._exists(file.name):
            self._fetch(file.name)
        return file

    @contextmanager
    def writing(self, key: str) -> Iterator[Path | None]:
        """A folder to write `file_name(kind=...)` files into; None when another builder makes this shard now."""
        with claimed(self.folder / f".{key}.claim") as mine:
            if not mine:
                yield None
                return
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=f".{key}.") as partial:
                yield Path(partial)

    def publish(self, key: str, partial: Path, facts: Facts) -> None:
        """Make the shard visible, whole."""
        names = [file_name(key, kind) for kind in facts["files"]]
        (partial / f"{key}.json").write_text(json.dumps(facts))
        for name in (*names, f"{key}.json"):
            sync(partial / name)
            if self.remote:
                self._put(partial / name)
            os.replace(partial / name, self.folder / name)
        sync(self.folder)

    def keys(self) -> list[str]:
        """Of every complete shard."""
        local = {file.stem for file in self.folder.glob("[0-9a-f]*.json")}
        if self.remote:
            system, path = _system(self.remote)
            local |= {Path(name).stem for name in system.glob(f"{path}/*.json")}
        return sorted(local)

    def remove(self, key: str) -> int:
        """Bytes that were freed."""
        freed = 0
        for name in (f"{key}.json", file_name(key, "train"), file_name(key, "validation")):
            if (file := self.folder / name).exists():
                freed += file.stat().st_size
                file.unlink()
            if self.remote and self._exists(name):
                system, path = _system(self.remote)
                system.rm_file(f"{path}/{name}")
        return freed

    def _exists(self, name: str) -> bool:
        system, path = _system(self.remote)
        return system.exists(f"{path}/{name}")

    def _fetch(self, name: str) -> None:
        system, path = _system(self.remote)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".fetch.") as partial:
            system.get_file(f"{path}/{name}", f"{partial}/{name}")
            os.replace(f"{partial}/{name}", self.folder / name)

    def _put(self, file: Path) -> None:
        """Under its final name at once on object stores, where a half-written object is never seen; by rename else."""
        system, path = _system(self.remote)
        system.makedirs(path, exist_ok=True)
        if str(self.remote).startswith(("s3://", "gs://")):
            system.put_file(str(file), f"{path}/{file.name}")
            return
        temporary = f"{path}/.{file.parent.name}.{file.name}"
        system.put_file(str(file), temporary)
        if system.exists(f"{path}/{file.name}"):  # another builder was faster: the same bytes
            system.rm_file(temporary)
        else:
            system.mv(temporary, f"{path}/{file.name}")


def file_name(key: str, kind: str) -> str:
    return f"{key}.arrow" if kind == "train" else f"{key}.{kind}.arrow"


def _system(remote: str | None) -> tuple[Any, str]:
    from controlllm.data.location import file_system

    assert remote is not None
    return file_system(remote)


def _spool(remote: str) -> Path:
    """Where shards of a remote store lie on this machine."""
    from controlllm.store import store_root

    return store_root() / "shards-of" / xxhash.xxh3_64_hexdigest(remote.encode())
