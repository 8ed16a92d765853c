"""The folder of a prepared dataset: its index and shards, its counts, and the rows that were set aside."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from controlllm.config import DatasetConfig, PackConfig
from controlllm.data.manifest import Manifest
from controlllm.data.shard import file_name
from controlllm.data.shard_store import ShardStore
from controlllm.store import store_root

Json = dict[str, Any]


def shard_root() -> str:
    """`CONTROLLLM_SHARDS`, a folder or an fsspec URI that builders share, or `shards` in the stage store."""
    return os.environ.get("CONTROLLLM_SHARDS") or str(store_root() / "shards")


def open_job(dataset: DatasetConfig, where: str, base: Path, data: Path, pack: PackConfig) -> tuple[Any, Manifest]:
    """A dataset's job and manifest, as ingest left it."""
    from controlllm.data.build import make_job
    from controlllm.data.held_out import HeldOut

    manifest = open_manifest(data, dataset.name)
    held_out = HeldOut.load(data / "held_out")
    return make_job(dataset, manifest, tokenizer_folder=base, pack=pack, where=where, held_out=held_out), manifest


def open_manifest(data: Path, name: str) -> Manifest:
    """A dataset's files and units, as ingest listed them."""
    return Manifest.from_json(json.loads((data / "manifests" / f"{name}.json").read_text()))


def take_shards(folder: Path) -> None:
    """Into this machine's store, out of a folder that `write_index` made somewhere."""
    store = ShardStore(shard_root())
    for unit in json.loads((folder / "index.json").read_text())["units"]:
        key = unit["key"]
        if store.facts(key) is None:
            with store.writing(key) as partial:
                if partial is not None:
                    for kind in unit["files"]:
                        _link(folder / file_name(key, kind), partial / file_name(key, kind))
                    store.publish(key, partial, unit)


def write_index(folder: Path, name: str, units: list[Json], renderer: Json, *, link: bool) -> None:
    """What the trainer opens; with `link` the shards stand beside it, sharing the store's bytes where that can be."""
    folder.mkdir(parents=True, exist_ok=True)
    if link:
        store = ShardStore(shard_root())
        for unit in units:
            for kind in unit["files"]:
                _link(store.path(unit["key"], kind), folder / file_name(unit["key"], kind))
    (folder / "index.json").write_text(json.dumps({"name": name, "renderer": renderer, "units": units}))


def _link(source: Path, target: Path) -> None:
    if target.exists():  # two equal pieces of a source are one shard
        return
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def write_stats(folder: Path, names: list[str], pack: PackConfig) -> None:
    """`stats.json` and `quarantine.jsonl` out of the datasets' indexes."""
    indexes = {name: json.loads((folder / name / "index.json").read_text()) for name in names}
    datasets = {name: _facts(index, pack) for name, index in indexes.items()}
    counts = ("rows", "filtered_rows", "bad_rows", "documents", "packed_rows", "tokens", "target_tokens",
              "validation_documents")  # fmt: skip
    total: Json = {name: sum(facts[name] for facts in datasets.values()) for name in counts}
    total["padding"] = _padding(total["tokens"], total["packed_rows"], pack)
    (folder / "stats.json").write_text(json.dumps(total | {"datasets": datasets}, indent=1))
    with (folder / "quarantine.jsonl").open("w") as stream:
        for name, index in indexes.items():
            for unit in index["units"]:
                stream.writelines(json.dumps({"dataset": name} | row) + "\n" for row in unit["bad"])


def _facts(index: Json, pack: PackConfig) -> Json:
    units = index["units"]

    def total(name: str, kind: str = "train") -> int:
        return sum(unit["files"].get(kind, {}).get(name, 0) for unit in units)

    def merged(name: str) -> Json:
        return dict(sum((Counter(unit[name]) for unit in units), Counter()))

    filtered = merged("filtered")
    return {
        "rows": sum(unit["rows"] for unit in units),
        "filtered_rows": sum(filtered.values()),
        "filtered": filtered,
        "bad_rows": sum(unit["bad_rows"] for unit in units),
        "cut": merged("cut"),
        "documents": total("documents"),
        "packed_rows": total("bins"),
        "tokens": total("tokens"),
        "target_tokens": total("targets"),
        "validation_documents": total("documents", "validation"),
        "padding": _padding(total("tokens"), total("bins"), pack),
        "lengths": merged("lengths"),
        "shards": len(units),
        "renderer": index["renderer"],
    }


def _padding(tokens: int, rows: int, pack: PackConfig) -> float:
    return round(1 - tokens / max(rows * pack.context_length, 1), 5)
