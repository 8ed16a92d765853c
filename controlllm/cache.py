"""What lies in the cache: stage outputs and shards, whether they are whole, and what can go."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from controlllm.data.claims import is_abandoned
from controlllm.data.prepared import shard_root
from controlllm.data.shard import Facts, file_name
from controlllm.data.shard_store import ShardStore
from controlllm.errors import UserError
from controlllm.fingerprint import hash_file
from controlllm.progress import track
from controlllm.store import LINEAGE, delivered, find_lineage, store_root

DAY = 86400
LEFT_SECONDS = 3600
"""What nobody has written to for so long is left over from a process that was killed."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A stage's output, a shard, or what a killed process left behind."""

    kind: str
    """A stage's name, shard, or left over."""
    key: str
    bytes: int
    made: float
    """Seconds since 1970."""
    what: str
    path: str
    used: bool
    """Whether something else needs it: a run's folder, or for a shard a prepared dataset."""
    damage: str | None = None
    """Why its description cannot be read."""
    source: str = ""
    """Of a shard: the file that its rows come from, ..."""
    rows: int = 0
    """... their number, ..."""
    context: int = 0
    """... and the context length."""


def entries() -> list[Entry]:
    """Everything in the cache, newest first. A damaged entry is one of them."""
    return sorted([*_outputs(), *_shards(), *_left_over()], key=lambda entry: -entry.made)


def verify(found: list[Entry]) -> Iterator[str]:
    """Read every byte again; yields a line for each file that is not what was written."""
    with track("verify", total=sum(entry.bytes for entry in found) or 1) as advance:
        done = 0
        for entry in found:
            yield from _damage(entry)
            done += entry.bytes
            advance(done, entry.kind)


def prune(*, older_than_days: float, remove: bool) -> list[Entry]:
    """Entries that nothing uses and that are older; with `remove` they are gone afterwards."""
    before = time.time() - older_than_days * DAY
    old = [entry for entry in entries() if not entry.used and entry.made <= before]
    for entry in old if remove else ():
        _remove(entry)
    return old


def grouped(found: Iterable[Entry]) -> list[list[Entry]]:
    """Shards of one folder's files and one context length together, everything else by itself."""
    groups: dict[Any, list[Entry]] = {}
    for entry in found:
        alone = entry.kind != "shard" or entry.damage
        key = entry.path if alone else (_folder(entry.source), entry.context, entry.used)
        groups.setdefault(key, []).append(entry)
    return list(groups.values())


def told(group: list[Entry]) -> tuple[str, str]:
    """What a group is, and what is to be said of it."""
    first = group[0]
    if first.kind != "shard" or first.damage:
        return f"{first.kind} {first.key}", first.damage or first.what
    sources = sorted({entry.source for entry in group})
    source = sources[0] if len(sources) == 1 else f"{len(sources)} files of {_folder(first.source)}"
    name = f"shard {first.key}" if len(group) == 1 else f"{len(group)} shards"
    return name, f"{sum(entry.rows for entry in group):,} rows of {source} · context {first.context} · {first.what}"


def to_json(entry: Entry) -> str:
    return json.dumps(vars(entry))


def parse_days(text: str) -> float:
    """`30d` or `12h` in days."""
    units = {"d": 1.0, "h": 1 / 24}
    if text[-1:] not in units or not text[:-1].replace(".", "", 1).isdecimal():
        raise UserError(f"--older-than: {text!r} is no age; write 30d or 12h")
    return float(text[:-1]) * units[text[-1]]


def _folder(source: str) -> str:
    """A procedural source is not one of several files."""
    return source.rpartition("/")[0] if source.rpartition("/")[0].strip(":/") and "#" not in source else source


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _outputs() -> Iterator[Entry]:
    linked = {Path(os.path.realpath(link)) for folder in delivered() for link in folder.iterdir() if link.is_symlink()}
    needed = linked | {parent for path in linked for parent in path.parents}
    for file in sorted(store_root().glob(f"*/*/{LINEAGE}")):
        folder = file.parent
        if folder.name.startswith("."):
            continue
        blank = Entry(folder.parent.name, folder.name, 0, file.stat().st_mtime, "", str(folder), False)
        blank = replace(blank, used=folder.resolve() in needed)
        try:
            lineage = find_lineage(folder) or {}
            size = sum(stamp["size"] for stamp in lineage["files"].values())
            yield replace(blank, kind=lineage["stage"], bytes=size, what=_date(blank.made))
        except (ValueError, KeyError, TypeError, AttributeError):  # whatever is in the file
            damage = f"{file}: damaged; remove {folder} and run again"
            yield replace(blank, bytes=_bytes_of(folder), damage=damage)


def _store() -> ShardStore | None:
    root = shard_root()
    return ShardStore(root) if "://" in root or Path(root).exists() else None


def _shards() -> Iterator[Entry]:
    if (store := _store()) is None:
        return
    files = store.files()
    for name in sorted(name for name in files if name.endswith(".json")):
        key, made = name.removesuffix(".json"), files[name].made
        size = sum(files[part].size for part in _parts(key) if part in files)
        blank = Entry("shard", key, size, made, _date(made), store.place(name), False)
        try:
            if facts := store.described(key):
                yield _shard(blank, facts, store)
        except UserError as error:
            yield replace(blank, damage=str(error))


def _parts(key: str) -> list[str]:
    return [f"{key}.json", file_name(key, "train"), file_name(key, "validation")]


def _shard(blank: Entry, facts: Facts, store: ShardStore) -> Entry:
    """With more than one link to a file, a prepared dataset shares it."""
    here = [store.folder / file_name(blank.key, kind) for kind in facts["files"]]
    used = any(file.stat().st_nlink > 1 for file in here if file.exists())
    context = facts["inputs"]["pack"]["context_length"]
    return replace(blank, used=used, source=facts["unit"]["uri"], rows=facts["rows"], context=context)


def _left_over() -> Iterator[Entry]:
    """Folders of stages and builders that were killed, their claims, and files of shards that were never finished."""
    paths = [path for path in store_root().glob("*/.*.partial") if not _is_locked(path)]
    store = _store()
    if store:
        hidden = [path for path in store.folder.glob(".*") if not _is_claimed(store, path)]
        whole = {name.partition(".")[0] for name in store.files() if name.endswith(".json")}
        paths += hidden + [path for path in store.folder.glob("*.arrow") if path.name.partition(".")[0] not in whole]
    for path in paths:
        made = max((file.stat().st_mtime for file in (path, *path.rglob("*")) if file.exists()), default=time.time())
        if time.time() - made > LEFT_SECONDS:
            what = f"of a process that was killed, {_date(made)}"
            yield Entry("left over", path.name, _bytes_of(path), made, what, str(path), False)


def _is_locked(partial: Path) -> bool:
    """Whether a stage is at work on it."""
    try:
        with FileLock(partial.with_suffix(".lock"), timeout=0):
            return False
    except Timeout:
        return True


def _is_claimed(store: ShardStore, path: Path) -> bool:
    claim = store.folder / f".{path.name.split('.')[1]}.claim"
    return claim.exists() and not is_abandoned(claim)


def _bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _damage(entry: Entry) -> Iterator[str]:
    if entry.damage:
        yield entry.damage
    elif entry.kind == "shard":
        store = ShardStore(shard_root())
        for kind, made in (store.described(entry.key) or {"files": {}})["files"].items():
            place = store.place(file_name(entry.key, kind))
            yield from _compared(place, store.hash_of(entry.key, kind), made["hash"])
    elif entry.kind != "left over":
        for name, stamp in (find_lineage(Path(entry.path)) or {"files": {}})["files"].items():
            file = Path(entry.path) / name
            yield from _compared(str(file), hash_file(file) if file.is_file() else None, stamp["hash"])


def _compared(place: str, found: str | None, wanted: str) -> Iterator[str]:
    if found is None:
        yield f"{place}: is missing; run the stage again"
    elif found != wanted:
        yield f"{place}: is not what was written; remove it and run the stage again"


def _remove(entry: Entry) -> None:
    if entry.kind == "shard":
        ShardStore(shard_root()).remove(entry.key)
    elif Path(entry.path).is_dir():
        shutil.rmtree(entry.path)
    else:
        Path(entry.path).unlink(missing_ok=True)
