"""The stage store: what a stage made, found again by everything that could have changed it.

A stage's output is a folder named by the hash of its inputs (config values, the content of the folders it reads,
the code it runs, the versions of the libraries that matter). `lineage.json`, written last, makes it complete.
A folder is built under another name and renamed, so that nothing half-written is ever found.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.markup import escape

from controlllm.changes import flatten, nearest
from controlllm.errors import UserError
from controlllm.fingerprint import LIBRARIES, code_hashes, content_of, sync, version
from controlllm.origin import origin
from controlllm.output import (
    LINEAGE,
    ancestors_of,
    content_hash,
    content_of_files,
    files_of,
    find_lineage,
    read_lineage,
    store_root,
    unchanged,
    without,
)
from controlllm.private import public
from controlllm.progress import console, duration, is_first_process
from controlllm.reasons import ledger, stored_in
from controlllm.reasons import why as why_of

DELIVERED = "delivered.txt"

__all__ = ["LINEAGE", "content_hash", "find_lineage", "read_lineage", "store_root"]  # of output, found here, too


@dataclass(frozen=True)
class Output:
    """A complete stage output."""

    path: Path
    lineage: dict[str, Any]
    cached: bool


class Miss(Exception):
    """In a dry run: this stage would compute."""

    def __init__(self, stage: str, parents: Mapping[str, Path]):
        super().__init__(stage)
        self.stage, self.parents = stage, parents


@dataclass(frozen=True)
class _DryRun:
    tell: Callable[[str], None]
    stand_in: bool


_dry: ContextVar[_DryRun | None] = ContextVar("dry run", default=None)


@contextmanager
def dry_run(tell: Callable[[str], None], *, stand_in: bool = False) -> Iterator[None]:
    """Inside, stages compute nothing: each is told as cached, and the first that is not raises Miss.

    stand_in: instead, the stored output whose inputs are nearest stands for it, so that every later stage is told by
    itself; Miss only where there is none.
    """
    token = _dry.set(_DryRun(tell, stand_in))
    try:
        yield
    finally:
        _dry.reset(token)


def at_work(stage: str) -> Path | None:
    """The folder in which a stage computes now, or last did before it was stopped; the newest of several."""
    found = (store_root() / stage.replace(" ", "-")).glob(".*.partial")
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


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
    dry, shown = _dry.get(), label or stage
    _make(home)
    with FileLock(home / f".{key}.lock"):
        if (lineage := _complete(final)) is not None:
            made = f"made {lineage['finished']}, took {duration(lineage['seconds'])}"
            if dry:
                dry.tell(f"{shown}: cached, {made}")
            elif is_first_process():
                console.print(f"[green]●[/] {shown:<13} cached    [dim]{made}[/]")
            return Output(final, lineage, cached=True)
        why = why_of(home, stage, key, public(inputs))
        if dry:
            return _not_computed(dry, home, stage, shown, inputs, parents, why)
        console.print(f"[cyan]▶[/] {shown:<13} computing [dim]{escape(why)}[/]", markup=True)
        partial = home / f".{key}.partial"
        if not resumable or final.exists():
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        _make(partial)
        began = time.time()
        try:
            build(partial)
            lineage = _describe(stage, key, inputs, parents, partial, began, why)
            _publish(partial, final, lineage)
        except BaseException:
            if not resumable:
                shutil.rmtree(partial, ignore_errors=True)
            raise
    _write_down(lineage)
    console.print(f"[green]✔[/] {shown:<13} computed  [dim]in {duration(lineage['seconds'])}[/]")
    return Output(final, lineage, cached=False)


def stage_inputs(stage: str, *, config: Mapping[str, Any], parents: Mapping[str, Path]) -> dict[str, Any]:
    """Every input of a stage under a readable name: the hash of this is the cache key."""
    inputs = dict(flatten(config))
    inputs |= {f"output of {name}": content_hash(path) for name, path in parents.items()}
    inputs |= {f"code {file}": digest for file, digest in code_hashes(stage)}
    inputs |= {f"version of {name}": version(name) for name in LIBRARIES[stage]}
    return inputs


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
        if not unchanged(path / name, stamp):
            console.print(f"[yellow]![/] {path / name} was changed or removed since it was made: made again")
            return None
    return lineage


def _describe(
    stage: str, key: str, inputs: dict[str, Any], parents: Mapping[str, Path], folder: Path, began: float, why: str
) -> dict[str, Any]:
    files = files_of(folder)
    return {
        "stage": stage,
        "key": key,
        "content": content_of_files(files),
        "started": _time(began),
        "finished": _time(time.time()),
        "seconds": round(time.time() - began, 2),
        "why": why,
        "made by": origin(),
        "inputs": public(inputs),
        "parents": {name: _parent(path) for name, path in parents.items()},
        "ancestors": ancestors_of(parents),
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


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _not_computed(
    dry: _DryRun, home: Path, stage: str, shown: str, inputs: dict[str, Any], parents: Mapping[str, Path], why: str
) -> Output:
    dry.tell(f"{shown}: would compute {why}")
    stored = list(stored_in(home)) if dry.stand_in else []
    other = nearest(public(inputs), [lineage["inputs"] for _, lineage in stored])
    for folder, lineage in stored:
        if lineage["inputs"] == other:
            return Output(folder, lineage, cached=True)
    raise Miss(stage, parents)


def _write_down(lineage: dict[str, Any]) -> None:
    """The output is there: what cannot be written down is said, and costs no work."""
    try:
        ledger().add(without(lineage, "files", "ancestors"))
    except UserError as error:
        console.print(f"[yellow]![/] lineage of {lineage['stage']} was not written down: {escape(str(error))}")
