"""The stage store: what a stage made, found again by everything that could have changed it.

A stage's output is a folder named by the hash of its inputs (config values, the content of the folders it reads,
the code it runs, the versions of the libraries that matter). `lineage.json`, written last, makes it complete.
A folder is built under another name and renamed, so that nothing half-written is ever found.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel

from controlllm.errors import UserError
from controlllm.fingerprint import LIBRARIES, code_hashes, content_of, digest, hash_file, sync, version
from controlllm.progress import console, duration, is_first_process

LINEAGE = "lineage.json"
DELIVERED = "delivered.txt"


@dataclass(frozen=True)
class Output:
    """A complete stage output."""

    path: Path
    lineage: dict[str, Any]
    cached: bool


def store_root() -> Path:
    """`CONTROLLLM_CACHE`, or `.controlllm` beside the place where the command is run."""
    return Path(os.environ.get("CONTROLLLM_CACHE", ".controlllm")).absolute()


class Miss(Exception):
    """In a dry run: this stage would compute."""

    def __init__(self, stage: str, parents: Mapping[str, Path]):
        super().__init__(stage)
        self.stage, self.parents = stage, parents


_told: ContextVar[Callable[[str], None] | None] = ContextVar("dry run", default=None)


@contextmanager
def dry_run(tell: Callable[[str], None]) -> Iterator[None]:
    """Inside, stages compute nothing: each is told as cached, and the first that is not raises Miss."""
    token = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(token)


def run_stage(
    stage: str,
    *,
    config: Mapping[str, Any],
    parents: Mapping[str, Path],
    build: Callable[[Path], Any],
    resumable: bool = False,
    label: str = "",
) -> Output:
    """The stored output for these inputs, or `build(folder)` into a new one.

    `config` and `parents` are everything that `build` may read. A resumable stage finds its unfinished folder again.
    label: what a person reads where one stage runs many times; the stage's name when left out.
    """
    inputs = stage_inputs(stage, config=config, parents=parents)
    key = content_of(inputs)
    home = store_root() / stage.replace(" ", "-")
    final = home / key
    tell, shown = _told.get(), label or stage
    _make(home)
    with FileLock(home / f".{key}.lock"):
        if (lineage := _complete(final)) is not None:
            made = f"made {lineage['finished']}, took {duration(lineage['seconds'])}"
            if tell:
                tell(f"{shown}: cached, {made}")
            elif is_first_process():
                console.print(f"[green]●[/] {shown:<13} cached    [dim]{made}[/]")
            return Output(final, lineage, cached=True)
        if tell:
            tell(f"{shown}: would compute {_why(home, inputs)}".replace("\\[", "["))
            raise Miss(stage, parents)
        console.print(f"[cyan]▶[/] {shown:<13} computing [dim]{_why(home, inputs)}[/]", markup=True)
        partial = home / f".{key}.partial"
        if not resumable or final.exists():
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        _make(partial)
        began = time.time()
        try:
            build(partial)
            lineage = _describe(stage, key, inputs, parents, partial, began)
            _publish(partial, final, lineage)
        except BaseException:
            if not resumable:
                shutil.rmtree(partial, ignore_errors=True)
            raise
    console.print(f"[green]✔[/] {shown:<13} computed  [dim]in {duration(lineage['seconds'])}[/]")
    return Output(final, lineage, cached=False)


def stage_inputs(stage: str, *, config: Mapping[str, Any], parents: Mapping[str, Path]) -> dict[str, Any]:
    """Every input of a stage under a readable name: the hash of this is the cache key."""
    inputs = dict(_flatten(config))
    inputs |= {f"output of {name}": content_hash(path) for name, path in parents.items()}
    inputs |= {f"code {file}": digest for file, digest in code_hashes(stage)}
    inputs |= {f"version of {name}": version(name) for name in LIBRARIES[stage]}
    return inputs


def content_hash(path: Path) -> str:
    """What a folder holds, whatever its place and time: names, sizes and hashes of its files.

    A folder of the store carries the answer; files that were touched since are read again.
    """
    stored = find_lineage(path)
    if stored is not None and all(_unchanged(path / name, stamp) for name, stamp in stored["files"].items()):
        return stored["content"]
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    return _content(_manifest(path))


def deliver_to(folder: Path) -> None:
    """Remember a folder outside that links to outputs, so that they are not pruned."""
    file = store_root() / DELIVERED
    if folder.absolute() not in delivered():
        with file.open("a") as stream:
            stream.write(f"{folder.absolute()}\n")


def delivered() -> list[Path]:
    """Folders that link to outputs and still exist."""
    file = store_root() / DELIVERED
    return (
        [folder for line in file.read_text().splitlines() if (folder := Path(line)).is_dir()] if file.exists() else []
    )


def read_lineage(path: Path) -> dict[str, Any]:
    """The lineage of a stage output; UserError when the folder is not one."""
    if (lineage := find_lineage(path)) is None:
        raise UserError(f"{path}: has no {LINEAGE}; give a folder that a controlllm stage made")
    return lineage


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made: {error.strerror}; set CONTROLLLM_CACHE to a writable folder"
        ) from None


def _complete(path: Path) -> dict[str, Any] | None:
    """The lineage if every file is still what it was; says so if one is not."""
    lineage = find_lineage(path)
    if lineage is None:
        return None
    for name, stamp in lineage["files"].items():
        if not _unchanged(path / name, stamp):
            console.print(f"[yellow]![/] {path / name} was changed or removed since it was made: made again")
            return None
    return lineage


def _unchanged(file: Path, stamp: dict[str, Any]) -> bool:
    try:
        status = file.stat()
    except FileNotFoundError:
        return False
    if status.st_size != stamp["size"]:
        return False
    return status.st_mtime_ns == stamp["mtime_ns"] or hash_file(file) == stamp["hash"]


def _describe(
    stage: str, key: str, inputs: dict[str, Any], parents: Mapping[str, Path], folder: Path, began: float
) -> dict[str, Any]:
    files = _manifest(folder)
    return {
        "stage": stage,
        "key": key,
        "content": _content(files),
        "started": _time(began),
        "finished": _time(time.time()),
        "seconds": round(time.time() - began, 2),
        "inputs": inputs,
        "parents": {name: _parent(path) for name, path in parents.items()},
        "files": files,
    }


def _parent(path: Path) -> dict[str, Any]:
    lineage = find_lineage(path) or {"stage": "a folder from outside", "key": path.name, "content": content_hash(path)}
    return {name: lineage[name] for name in ("stage", "key", "content")}


def _publish(partial: Path, final: Path, lineage: dict[str, Any]) -> None:
    (partial / LINEAGE).write_text(json.dumps(lineage, indent=1))
    for file in partial.rglob("*"):
        sync(file)
    sync(partial)
    partial.rename(final)
    sync(final.parent)


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != LINEAGE)
    return {
        f.relative_to(folder).as_posix(): {
            "size": f.stat().st_size,
            "mtime_ns": f.stat().st_mtime_ns,
            "hash": hash_file(f),
        }
        for f in files
    }


def _content(files: dict[str, dict[str, Any]]) -> str:
    return digest(json.dumps([[name, stamp["size"], stamp["hash"]] for name, stamp in sorted(files.items())]))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def find_lineage(path: Path) -> dict[str, Any] | None:
    """The lineage of a stage output, or None for any other folder."""
    try:
        return json.loads((path / LINEAGE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise UserError(f"{path / LINEAGE}: is damaged ({error.msg}); remove {path} and run again") from None


def _why(home: Path, inputs: dict[str, Any]) -> str:
    """Which inputs differ from the stored output that is nearest to them."""
    stored = [
        lineage["inputs"]
        for folder in home.iterdir()
        if not folder.name.startswith(".") and (lineage := find_lineage(folder))
    ]
    # Another task is no earlier version of this one.
    stored = [other for other in stored if other.get("task.name") == inputs.get("task.name")]
    if not stored:
        return "first time"
    nearest = min(stored, key=lambda other: len(_differing(inputs, other)))
    names = _differing(inputs, nearest)
    if not names:
        return "the stored output was damaged"
    shown = [_change(name, nearest, inputs) for name in names[:4]]
    return "because " + ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "") + " changed"


def differences(old: Any, new: Any) -> list[str]:
    """Dotted names of the values in which two trees differ."""
    return _differing(dict(_flatten(old)), dict(_flatten(new)))


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]


def _change(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if name.startswith(("code ", "output of ")):
        return name
    return f"{name} ({json.dumps(old.get(name))} → {json.dumps(new.get(name))})".replace("[", "\\[")


def _flatten(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, BaseModel | Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _flatten(item, f"{path}.{index}")
    else:
        yield path, value
