"""What lies in the cache: stage outputs and shards, whether they are whole, why a stage would run, and what can go."""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlllm.config import RunConfig
from controlllm.data.prepared import open_job, shard_root
from controlllm.data.shard import Facts, ShardStore
from controlllm.errors import UserError
from controlllm.fingerprint import hash_file
from controlllm.progress import track
from controlllm.store import LINEAGE, Miss, delivered, differences, dry_run, find_lineage, store_root

DAY = 86400
Json = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A stage's output, or a shard."""

    kind: str
    key: str
    bytes: int
    made: float
    """Seconds since 1970."""
    what: str
    path: Path
    used: bool
    """Whether something else needs it: a run's folder, or for a shard a prepared dataset."""


def entries() -> list[Entry]:
    """Everything in the cache, newest first."""
    return sorted([*_outputs(), *_shards()], key=lambda entry: -entry.made)


def verify() -> Iterator[tuple[Entry, str]]:
    """Read every byte again; yields what is not what was written."""
    found = entries()
    with track("verify", total=sum(entry.bytes for entry in found) or 1) as advance:
        done = 0
        for entry in found:
            yield from ((entry, damage) for damage in _damage(entry))
            done += entry.bytes
            advance(done, entry.kind)


def prune(*, older_than_days: float, remove: bool) -> list[Entry]:
    """Entries that nothing uses and that are older; with `remove` they are gone afterwards."""
    before = time.time() - older_than_days * DAY
    old = [entry for entry in entries() if not entry.used and entry.made <= before]
    for entry in old if remove else ():
        if entry.kind == "shard":
            ShardStore(shard_root()).remove(entry.key)
        else:
            shutil.rmtree(entry.path)
    return old


def explain(config: RunConfig, *, until: str) -> list[str]:
    """A line per stage: cached, or what changed; for prepare also how many shards stay."""
    from controlllm import pipeline

    lines: list[str] = []
    with dry_run(lines.append):
        try:
            pipeline.run(config, until=until)
        except Miss as miss:
            if miss.stage == "prepare":
                base, data = (miss.parents[name] for name in ("ingest model", "ingest data"))
                lines += [
                    line for n in range(len(config.mix.datasets)) for line in _explain_shards(config, n, base, data)
                ]
            lines.append("what comes after it runs, too, unless it makes the same output again")
    return lines


def _outputs() -> Iterator[Entry]:
    root = store_root()
    linked = {Path(os.path.realpath(link)) for folder in delivered() for link in folder.iterdir() if link.is_symlink()}
    for file in sorted(root.glob(f"*/*/{LINEAGE}")):
        lineage, folder = find_lineage(file.parent) or {}, file.parent
        if folder.name.startswith("."):
            continue
        size = sum(stamp["size"] for stamp in lineage["files"].values())
        yield Entry(
            lineage["stage"], lineage["key"], size, file.stat().st_mtime, lineage["finished"], folder, folder in linked
        )


def _shards() -> Iterator[Entry]:
    if "://" not in shard_root() and not Path(shard_root()).exists():
        return
    store = ShardStore(shard_root())
    for key in store.keys():  # noqa: SIM118 - a method of ours
        facts = store.facts(key)
        if facts is None:
            continue
        file = store.folder / f"{key}.json"
        made = facts["files"]
        used = any(path.stat().st_nlink > 1 for kind in made if (path := store.path(key, kind)).exists())
        size = sum(part["size"] for part in made.values())
        yield Entry("shard", key, size, file.stat().st_mtime, _unit(facts), file, used)


def _unit(facts: Facts) -> str:
    unit = facts["unit"]
    return f"{facts['rows']:,} rows of {unit['uri']}"


def _damage(entry: Entry) -> Iterator[str]:
    if entry.kind == "shard":
        store = ShardStore(shard_root())
        files = {store.path(entry.key, kind): m["hash"] for kind, m in (store.facts(entry.key) or {})["files"].items()}
    else:
        files = {entry.path / name: s["hash"] for name, s in (find_lineage(entry.path) or {})["files"].items()}
    for file, wanted in files.items():
        if not file.exists():
            yield f"{file}: is missing; run the stage again"
        elif hash_file(file) != wanted:
            yield f"{file}: is not what was written; remove {entry.path} and run the stage again"


def _explain_shards(config: RunConfig, number: int, base: Path, data: Path) -> Iterator[str]:
    dataset = config.mix.datasets[number]
    job, manifest = open_job(dataset, f"mix.datasets.{number}", base, data, config.pack)
    from controlllm.data.build import find_duplicates, unit_key

    find_duplicates(job, manifest)
    store = ShardStore(shard_root())
    stored: list[Facts] = [facts for key in store.keys() if (facts := store.facts(key))]  # noqa: SIM118
    reasons: Counter[str] = Counter()
    for place, unit in enumerate(manifest.units):
        if store.facts(unit_key(job, place, unit)) is None:
            reasons[_reason(job.unit_inputs(place, unit), stored)] += 1
    made = len(manifest.units) - reasons.total()
    yield f"  {dataset.name}: {made} of {len(manifest.units)} shards are there"
    yield from (f"  {dataset.name}: {count} to make, because {reason}" for reason, count in reasons.most_common())


def _reason(inputs: Json, stored: list[Facts]) -> str:
    if not stored:
        return "there is no shard yet"
    changes = min((differences(facts["inputs"], inputs) for facts in stored), key=len)
    return ", ".join(changes) + " changed" if changes else "its file was removed"


def parse_days(text: str) -> float:
    """`30d` or `12h` in days."""
    units = {"d": 1.0, "h": 1 / 24}
    if text[-1:] not in units or not text[:-1].replace(".", "", 1).isdigit():
        raise UserError(f"--older-than: {text!r} is no age; write 30d or 12h")
    return float(text[:-1]) * units[text[-1]]


def to_json(entry: Entry) -> str:
    return json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in vars(entry).items()})
