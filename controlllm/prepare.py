"""Stage 2: documents to packed token rows in Arrow."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from controlllm.config import PackConfig
from controlllm.errors import UserError
from controlllm.progress import track
from controlllm.store import Output, run_stage


def prepare(base: Path, data: Path, pack: PackConfig) -> Output:
    """`<dataset>.arrow` per dataset, `validation.arrow`, and `stats.json`."""

    def build(folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base)
        held_back: list[Any] = []
        stats: dict[str, Any] = {}
        for file in sorted((data / "train").glob("*.jsonl")):
            counts = _Counts()
            documents = list(_tokenized(file, tokenizer, pack, counts))
            kept = [d for d in documents if not _is_validation(d, pack.validation_fraction)]
            held_back += [d for d in documents if _is_validation(d, pack.validation_fraction)]
            if not kept:
                raise UserError(
                    f"{file.stem}: no document is left to train on ({counts.rows} rows, {counts.dropped} dropped)"
                )
            stats[file.stem] = counts.summary(_write(folder / f"{file.stem}.arrow", kept, pack), kept, pack)
        if held_back:
            _write(folder / "validation.arrow", held_back, pack)
        (folder / "stats.json").write_text(json.dumps(_total(stats, len(held_back)), indent=1))

    return run_stage("prepare", config={"pack": pack}, parents={"ingest model": base, "ingest data": data}, build=build)


class _Counts:
    """Rows in = rows packed + dropped; a split row is one row and several documents."""

    def __init__(self) -> None:
        self.rows = self.dropped = self.cut = 0

    def summary(self, bins: int, kept: list[Any], pack: PackConfig) -> dict[str, Any]:
        tokens = sum(len(d.input_ids) for d in kept)
        return {
            "rows": self.rows,
            "dropped_rows": self.dropped,
            "cut_rows": self.cut,
            "documents": len(kept),
            "packed_rows": bins,
            "tokens": tokens,
            "target_tokens": sum(sum(d.target) for d in kept),
            "padding": round(1 - tokens / (bins * pack.context_length), 5),
        }


def _total(stats: dict[str, dict[str, Any]], validation: int) -> dict[str, Any]:
    names = ("rows", "dropped_rows", "cut_rows", "documents", "packed_rows", "tokens", "target_tokens")
    total = {name: sum(s[name] for s in stats.values()) for name in names}
    padding = sum(s["padding"] * s["packed_rows"] for s in stats.values()) / total["packed_rows"]
    return total | {"validation_documents": validation, "padding": round(padding, 5), "datasets": stats}


def _tokenized(file: Path, tokenizer: Any, pack: PackConfig, counts: _Counts) -> Iterator[Any]:
    from controlllm.data.render import render

    lines = file.read_text().splitlines()
    with track("tokenise", total=len(lines), unit=file.stem) as advance:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            counts.rows += 1
            try:
                tokens = render(row.get("messages") or row["text"], tokenizer)
                yield from _fit(tokens, pack, counts)
            except UserError as error:
                raise UserError(f"{file.stem} row {number}: {error}") from None
            advance(number)


def _fit(tokens: Any, pack: PackConfig, counts: _Counts) -> Iterator[Any]:
    """A document that is longer than the context is split, dropped, truncated or refused, as the recipe says."""
    from controlllm.data.render import Tokens

    size = pack.context_length
    if len(tokens.input_ids) <= size:
        yield tokens
    elif pack.overlong == "error":
        raise UserError(
            f"{len(tokens.input_ids)} tokens do not fit into pack.context_length {size}; "
            "raise it, or set pack.overlong to split, truncate or drop"
        )
    elif pack.overlong == "drop":
        counts.dropped += 1
    else:
        counts.cut += 1
        starts = range(0, len(tokens.input_ids), size) if pack.overlong == "split" else (0,)
        pieces = [Tokens(tokens.input_ids[s : s + size], tokens.target[s : s + size]) for s in starts]
        yield from (piece for piece in pieces if any(piece.target))


def _is_validation(tokens: Any, fraction: float) -> bool:
    """By content, so that adding rows never moves a row from one side to the other."""
    digest = xxhash.xxh3_64_intdigest(json.dumps(tokens.input_ids).encode())
    return digest < fraction * 2**64


def _write(file: Path, documents: list[Any], pack: PackConfig) -> int:
    """One row per bin: ids, which of them are targets, and the documents' lengths."""
    import pyarrow as pa

    from controlllm.data.pack import best_fit

    lengths = [len(d.input_ids) for d in documents]
    bins = (
        best_fit(lengths, pack.context_length) if pack.strategy == "best_fit" else [[i] for i in range(len(documents))]
    )
    table = pa.table({
        "input_ids": pa.array([[t for i in row for t in documents[i].input_ids] for row in bins], pa.list_(pa.int32())),
        "target": pa.array([[t for i in row for t in documents[i].target] for row in bins], pa.list_(pa.bool_())),
        "lengths": pa.array([[lengths[i] for i in row] for row in bins], pa.list_(pa.int32())),
    })  # fmt: skip
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1024)
    return len(bins)
