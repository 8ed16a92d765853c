"""A planned model as files: those of the base that are part of it, and shards of the rest, with an index."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from controlllm.config.export import ExportConfig
from controlllm.consolidate.plan import Plan
from controlllm.control.tensor_files import DTYPES, Source, write
from controlllm.progress import console, track

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MEGABYTE, GIGABYTE = 10**6, 10**9


def write_weights(plan: Plan, folder: Path, export: ExportConfig) -> None:
    """Every tensor of the plan, in files as `save_pretrained` names them."""
    shards = split(plan.tensors, int(export.max_shard_gb * GIGABYTE))
    count = len(plan.taken) + len(shards)
    names = iter([SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)])
    places: dict[str, str] = {}
    taken = _take(plan.taken, [next(names) for _ in plan.taken], folder, places)
    with _bytes_shown(sum(source.size for source in plan.tensors.values())) as advance:
        for shard in shards:
            name = next(names)
            for done in write(folder / name, shard):
                advance(done)
            places |= dict.fromkeys(shard, name)
    if count > 1:
        size = taken + sum(source.size for source in plan.tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def split(tensors: Mapping[str, Source], most: int) -> list[dict[str, Source]]:
    """In their order, at most so many bytes together, and at least one."""
    shards: list[dict[str, Source]] = []
    size = 0
    for name, source in tensors.items():
        if not shards or size + source.size > most:
            shards.append({})
            size = 0
        shards[-1][name] = source
        size += source.size
    return [_aligned(shard) for shard in shards]


def _aligned(shard: dict[str, Source]) -> dict[str, Source]:
    """The widest types first, so that readers can map all of it."""
    return dict(sorted(shard.items(), key=lambda item: -DTYPES[item[1].dtype].itemsize))


def _take(files: Mapping[Path, list[str]], names: list[str], folder: Path, places: dict[str, str]) -> int:
    """Link the files, or copy them where that cannot be; returns their tensors' bytes."""
    size, copied = 0, ""
    for (file, keys), name in zip(files.items(), names, strict=True):
        real = file.resolve()
        try:
            os.link(real, folder / name)
        except OSError as error:  # another file system, or one without links, or a file of somebody else
            copied = error.strerror
            shutil.copyfile(real, folder / name)
        places |= dict.fromkeys(keys, name)
        size += real.stat().st_size
    if copied:
        console.print(f"  frozen: the base's files are copied, because they cannot be linked ({copied})", markup=False)
    return size


@contextmanager
def _bytes_shown(total: int) -> Iterator[Any]:
    """Yield `advance(bytes)`."""
    done = shown = 0
    with track("write", total=max(1, math.ceil(total / MEGABYTE)), unit="MB") as show:

        def advance(size: int) -> None:
            nonlocal done, shown
            done += size
            if shown < (shown := math.ceil(done / MEGABYTE)):
                show(shown)

        yield advance
