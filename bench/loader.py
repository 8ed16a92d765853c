"""What training waits for: opening 20 million packed rows, seeking in them, and the speed of two ranks that read them.

python bench/loader.py [--rows 20000000] [--unit-rows 65536] [--context-length 8192]

The index is of real size and every shard a real file; all of them are hard links of one, which spares the
disk. Each part runs in a process of its own, and times begin after the imports.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TOKENS = 200
"""Of a row, on average."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--unit-rows", type=int, default=65_536)
    parser.add_argument("--context-length", type=int, default=8192)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        PARTS[options.work[0]](Path(options.work[1]), *map(int, options.work[2:]))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.rows, options.unit_rows, options.context_length)
        run("open", folder)
        for process in [start("read", folder, rank, 2) for rank in range(2)]:
            process.wait()


def write(folder: Path, rows: int, unit_rows: int, context_length: int) -> None:
    """`index.json` and its shards."""
    from controlllm.data.pack import best_fit, gather
    from controlllm.data.shard import ShardWriter, file_name

    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(TOKENS) - 0.32, 0.8, unit_rows), 2, context_length).astype(np.int64)
    ids, target = random.integers(0, 49152, lengths.sum()).astype(np.uint16), random.random(lengths.sum()) < 0.6
    bins = best_fit(lengths, context_length)
    starts, size = (np.cumsum(lengths) - lengths)[bins.items], lengths[bins.items]
    first = folder / file_name("0", "train")
    writer = ShardWriter(first, vocabulary=49152)
    writer.write(gather(ids, starts, size), gather(target, starts, size), size, bins.items, bins.offsets)
    made = writer.close()
    units = [{"key": str(n), "files": {"train": made}} for n in range(-(-rows // unit_rows))]
    for unit in units[1:]:
        os.link(first, folder / file_name(unit["key"], "train"))
    (folder / "index.json").write_text(json.dumps({"name": "bench", "units": units}))
    print(f"{rows:,} rows in {len(units)} shards, {made['bins'] * len(units):,} packed rows of {context_length} tokens")


def open_rows(folder: Path) -> None:
    from controlllm.data.loader import collate  # noqa: F401 - imports are not measured

    before = resident()
    began = time.perf_counter()
    mix = open_mix(folder)
    mix.step(0, global_batch=8, micro_batch=1)
    opened = time.perf_counter() - began
    began = time.perf_counter()
    mix.step(10**5, global_batch=8, micro_batch=1)
    print(f"first batch {opened:.3f} s · seek to step 100,000 {time.perf_counter() - began:.3f} s")
    print(f"resident {resident():.0f} MB, of which imports {before:.0f} MB")


def read_rows(folder: Path, rank: int, world: int) -> None:
    mix = open_mix(folder)
    mix.step(0, global_batch=64, micro_batch=1, rank=rank, world=world)
    tokens, step, began = 0, 1, time.perf_counter()
    while time.perf_counter() - began < 10:
        tokens += sum(b.tokens for b in mix.step(step, global_batch=64, micro_batch=1, rank=rank, world=world))
        step += 1
    print(f"rank {rank} of {world}: {tokens / (time.perf_counter() - began) / 1e6:.1f} M tokens/s")


def open_mix(folder: Path):
    from controlllm.config import DatasetConfig, MixConfig, PackConfig
    from controlllm.data.loader import Mix
    from controlllm.data.shelf import Shelf

    return Mix([Shelf.open(folder)], MixConfig(datasets=[DatasetConfig(name="bench")]), PackConfig())


def resident() -> float:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) / 1000


PARTS = {"open": open_rows, "read": read_rows}


def start(part: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--work", part, *map(str, arguments)]
    return subprocess.Popen(command)  # noqa: S603 - this file


def run(part: str, *arguments: object) -> None:
    start(part, *arguments).wait()


if __name__ == "__main__":
    main()
