"""Copies a data set of any kind to a folder of any kind, checked file by file; stopped, the same command goes on."""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from controlllm.data.location import (
    MANIFEST_NAME,
    file_system,
    is_remote,
    kind_of,
    list_files,
    local_path,
    open_file,
    relative_names,
    shown,
    stamp,
)
from controlllm.data.manifest import SourceFile, list_source, read_unit
from controlllm.data.remote import info_of, told
from controlllm.data.sources import GYM
from controlllm.data.types import Stamp, Unit
from controlllm.errors import UserError
from controlllm.progress import console, track

FILE_ROWS = 100_000
GROUP_ROWS = 16_384
BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class _Part:
    """A file to be: its name below the target folder, what decides its content, and how it is made."""

    name: str
    origin: str
    size: int
    make: Callable[[Path], None]


def transfer(source: str, to: str) -> None:
    """Copy a source's files as they are into the folder `to`; what has no files (hub, puzzles) as Parquet files.

    Each file is read back and compared before the list of files in the target says that it is there.
    """
    to = to.rstrip("/")
    if kind_of(to) not in ("file", "hdfs", "webhdfs", "s3", "gs"):
        raise UserError(f"{shown(to)}: data can be put into a folder, or hdfs://, webhdfs://, s3://, gs://")
    parts = list(_parts(source))
    done = _listed(to)
    with track("transfer", total=sum(part.size for part in parts) or 1, unit="bytes") as advance:
        moved = 0
        for part in parts:
            if not _is_done(part, to, done):
                done[part.name] = _put(part, to) | {"origin": part.origin}
                _write_list(to, source, done, complete=False)
            moved += part.size
            advance(moved, part.name)
    _write_list(to, source, {part.name: done[part.name] for part in parts}, complete=True)
    files = f"{len(parts)} file{'s' * (len(parts) != 1)}"
    console.print(f"  {files}; in a recipe: source: {shown(to)}/{_glob(parts)}", markup=False)


def _parts(source: str) -> Iterator[_Part]:
    if kind_of(source) == "hf" or source.startswith(GYM):
        yield from _tables(source)
        return
    files = list_files(source)
    for uri, name in zip(files, relative_names(source, files), strict=True):
        mark = stamp(uri)
        yield _Part(name, f"{shown(uri)} {mark.size} {mark.version}", mark.size, partial(_copy, uri))


def _tables(source: str) -> Iterator[_Part]:
    manifest = list_source(source, unit_rows=FILE_ROWS)
    pieces = [(file, unit) for file in manifest.files for unit in _whole_pieces(file)]
    for number, (file, unit) in enumerate(pieces):
        origin = f"{Path(file.uri).name} {file.stamp.size} {file.stamp.version} rows {unit.offset}+{unit.rows}"
        size = file.stamp.size * (unit.rows or 0) // max(sum(u.rows or 0 for u in file.units), 1)
        make = partial(_write_table, unit)
        yield _Part(f"{number:05d}-of-{len(pieces):05d}.parquet", origin, size, make)


def _whole_pieces(file: SourceFile) -> Iterator[Unit]:
    """Pieces of equal size: only training needs a small one first."""
    first, rows = file.units[0], sum(unit.rows or 0 for unit in file.units)
    if first.format != "arrow":
        yield first
        return
    for at in range(0, rows, FILE_ROWS):
        yield replace(first, offset=at, rows=min(FILE_ROWS, rows - at))


def _write_table(unit: Unit, file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [
        batch.table if batch.table is not None else pa.Table.from_pylist(batch.rows()) for batch in read_unit(unit)
    ]
    table = pa.concat_tables(tables).replace_schema_metadata(None)
    pq.write_table(table, file, compression="zstd", row_group_size=GROUP_ROWS)


def _copy(uri: str, file: Path) -> None:
    before = stamp(uri)
    with open_file(uri) as source, file.open("wb") as target:
        while block := source.read(BLOCK_BYTES):
            target.write(block)
    if stamp(uri) != before or file.stat().st_size != before.size:
        raise UserError(f"{shown(uri)}: changed while it was read; run the same command again")


def _put(part: _Part, to: str) -> dict[str, Any]:
    """Make the file here, put it under a temporary name, read it back, give it its name."""
    with tempfile.TemporaryDirectory(prefix="controlllm-transfer-") as folder:
        file = Path(folder, "file")
        part.make(file)
        made = _hash(str(file))
        final = f"{to}/{part.name}"
        head, _, tail = final.rpartition("/")
        temporary = final if kind_of(to) in ("s3", "gs") else f"{head}/.{tail}.part"  # there a put is one act
        _send(file, temporary)
        if _hash(temporary) != made:
            raise UserError(f"{shown(final)}: what was written is not what is read back; run the same command again")
        if temporary != final:
            _rename(temporary, final)
        return {"size": file.stat().st_size, "xxh3_128": made, "stamp": asdict(stamp(final))}


def _send(file: Path, uri: str) -> None:
    with told(uri):
        system, path = file_system(uri)
        if kind_of(uri) not in ("s3", "gs"):
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
        system.put_file(str(file), path)


def _rename(old: str, new: str) -> None:
    with told(new):
        system, path = file_system(new)
        if is_remote(new) and _is_there(new):  # HDFS does not rename over a file
            system.rm_file(path)
        system.mv(file_system(old)[1], path)


def _hash(uri: str) -> str:
    digest = xxhash.xxh3_128()
    with open_file(uri) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _listed(to: str) -> dict[str, dict[str, Any]]:
    """What an earlier run has put there."""
    uri = f"{to}/{MANIFEST_NAME}"
    if not _is_there(uri):
        return {}
    with open_file(uri) as file:
        return {entry.pop("name"): entry for entry in json.loads(file.read())["files"]}


def _is_done(part: _Part, to: str, done: dict[str, dict[str, Any]]) -> bool:
    entry = done.get(part.name)
    if entry is None or entry["origin"] != part.origin:
        return False
    uri = f"{to}/{part.name}"
    return _is_there(uri) and stamp(uri) == Stamp(**entry["stamp"])


def _is_there(uri: str) -> bool:
    path = local_path(uri)
    return info_of(uri) is not None if path is None else path.exists()


def _write_list(to: str, source: str, files: dict[str, dict[str, Any]], *, complete: bool) -> None:
    listed = [{"name": name, **entry} for name, entry in sorted(files.items())]
    content = {"source": shown(source), "complete": complete, "files": listed}
    with tempfile.TemporaryDirectory(prefix="controlllm-transfer-") as folder:
        file = Path(folder, MANIFEST_NAME)
        file.write_text(json.dumps(content, indent=1))
        _send(file, f"{to}/{MANIFEST_NAME}")


def _glob(parts: list[_Part]) -> str:
    """The pattern that names them all, and nothing else."""
    if len(parts) == 1:
        return parts[0].name
    endings = {part.name.rpartition("/")[2].partition(".")[2] for part in parts}
    deep = "**/" if any("/" in part.name for part in parts) else ""
    return f"{deep}*.{endings.pop()}" if len(endings) == 1 else f"{deep}*"
