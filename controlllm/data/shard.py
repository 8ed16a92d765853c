"""The file of a shard: packed rows in Arrow, with a hash for every batch of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from controlllm.fingerprint import hash_file

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


def file_name(key: str, kind: str) -> str:
    return f"{key}.arrow" if kind == "train" else f"{key}.{kind}.arrow"
