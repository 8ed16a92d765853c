"""Chat rows to measure with, in any number: real sentences and code in new combinations, as parquet.

python bench/chat_rows.py FOLDER [rows]

The text is that of the task descriptions and programs which reasoning-gym ships, paragraphs shuffled anew for
every file and each message a run of whole lines or sentences. A row has about 900 bytes and 220 tokens of SmolLM2's,
lognormal; four of five are one question and one answer.
"""

import gzip
import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FILE_ROWS = 100_000
BYTES, SPREAD, LONGEST = 620, 0.7, 12_000
"""Of a row: mean and standard deviation (of the logarithm), and the most; whole lines add some."""


def write_rows(folder: Path, rows: int) -> Path:
    """`chat-000.parquet`, ... with `messages: list<struct<role, content>>`; what is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    paragraphs: list[str] = []
    for number, start in enumerate(range(0, rows, FILE_ROWS)):
        file = folder / f"chat-{number:03d}.parquet"
        if not file.exists():
            paragraphs = paragraphs or _paragraphs()
            table = _table(min(FILE_ROWS, rows - start), paragraphs, np.random.default_rng(number))
            partial = file.with_suffix(".partial")
            pq.write_table(table, partial, compression="zstd", row_group_size=16_384)
            partial.rename(file)
    return folder


def _paragraphs() -> list[str]:
    import reasoning_gym

    file = Path(reasoning_gym.__file__).parent / "data/codeio-hq.jsonl.gz"
    rows = json.loads(gzip.decompress(file.read_bytes()))  # one array, whatever its name says
    parts = (("task_description", rows), ("input_output_spec", rows[::2]), ("code_sample", rows[::6]))
    texts = [row[name] for name, chosen in parts for row in chosen]
    return [part for text in texts for part in re.split(r"\n\s*\n", text) if part.strip()]


def _table(rows: int, paragraphs: list[str], rng: np.random.Generator) -> pa.Table:
    order = rng.permutation(len(paragraphs))
    text = ("\n".join(paragraphs[i] for i in order) + "\n").encode()
    breaks = [found.span() for found in re.finditer(rb"(?<=[.?!])\s+|\s*\n\s*", text)]
    stops, bounds = (np.array(side) for side in zip(*breaks, strict=True))  # a piece ends, the next one begins
    messages = 2 * rng.choice([1, 2, 3], size=rows, p=[0.8, 0.15, 0.05])
    offsets = np.concatenate([[0], np.cumsum(messages)])
    answer = np.arange(offsets[-1]) % 2 == 1
    size = np.minimum(rng.lognormal(np.log(BYTES) - SPREAD**2 / 2, SPREAD, rows), LONGEST)
    wanted = np.repeat(size / messages, messages) * np.where(answer, 1.4, 0.6)
    first = rng.integers(0, np.searchsorted(bounds, len(text) - 2 * LONGEST), offsets[-1])
    last = np.maximum(np.searchsorted(bounds, bounds[first] + wanted), first + 1)
    length = stops[last] - bounds[first]
    ends = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
    contents = b"".join(text[a:b] for a, b in zip(bounds[first].tolist(), stops[last].tolist(), strict=True))
    content = pa.StringArray.from_buffers(len(length), pa.py_buffer(ends), pa.py_buffer(contents))
    role = pa.DictionaryArray.from_arrays(answer.astype(np.int8), ["user", "assistant"]).cast(pa.string())
    struct = pa.StructArray.from_arrays([role, content], ["role", "content"])
    return pa.table({"messages": pa.ListArray.from_arrays(offsets.astype(np.int32), struct)})


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]), *map(int, sys.argv[2:] or ["20000"]))
