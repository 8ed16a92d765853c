"""All units of a dataset to shards, in as many processes as there are cores; what is there is not made again."""

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from controlllm.config import DatasetConfig, PackConfig
from controlllm.data.held_out import HeldOut
from controlllm.data.job import Job, rows_to_drop
from controlllm.data.keys import content_keys
from controlllm.data.manifest import Manifest, read_unit, read_units
from controlllm.data.render import Renderer
from controlllm.data.shard import Facts, ShardStore
from controlllm.data.types import Documents, Unit
from controlllm.errors import UserError
from controlllm.fingerprint import content_of
from controlllm.progress import track

# The tokenizers' own threads would stand in the way of the processes.
os.environ.setdefault("RAYON_NUM_THREADS", "1")

TOGETHER = 8
"""Units of one row group that a process makes in one pass over it."""
SAMPLE = 1000
"""Documents on which the fast ways of rendering and tokenising are proven."""


@dataclass(frozen=True)
class Prepared:
    """A dataset's shards, in the order of its units."""

    name: str
    units: list[Facts]
    renderer: dict[str, Any]
    seconds: float
    computed: int
    """Units that were not there before."""

    def total(self, name: str, kind: str = "train") -> int:
        """Sum of a count (bins, documents, tokens, targets) over the units."""
        return sum(unit["files"].get(kind, {}).get(name, 0) for unit in self.units)

    @property
    def rows(self) -> int:
        return sum(unit["rows"] for unit in self.units)

    @property
    def tokens(self) -> int:
        return self.total("tokens")

    @property
    def packed_rows(self) -> int:
        return self.total("bins")


def worker_count() -> int:
    """`CONTROLLLM_WORKERS`, or the cores that this process may use."""
    asked = os.environ.get("CONTROLLLM_WORKERS")
    if asked is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not asked.isdigit() or not int(asked):
        raise UserError(f"CONTROLLLM_WORKERS: must be a number of processes, found {asked!r}")
    return int(asked)


def make_job(
    dataset: DatasetConfig,
    manifest: Manifest,
    *,
    tokenizer_folder: Path,
    pack: PackConfig,
    where: str = "dataset",
    held_out: HeldOut | None = None,
) -> Job:
    """Loads the tokenizer and proves the fast paths on the first rows. Raises UserError for a dataset without rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    template = Path(pack.chat_template).read_text() if pack.chat_template else None
    renderer = Renderer(
        tokenizer, targets=pack.targets, date=pack.date, chat_template=template, tokenizer_mode=pack.tokenizer
    )
    job = Job(
        dataset,
        where,
        pack,
        renderer,
        held_out,
        stamps={file.uri: file.stamp for file in manifest.files},
        tokenizer=_tokenizer_hash(tokenizer, template or tokenizer.chat_template),
        vocabulary=len(tokenizer),
    )
    renderer.prove(_sample(job, manifest.units))
    return job


def _tokenizer_hash(tokenizer: Any, template: Any) -> str:
    """Over what the tokenizer does, and not over the folder it came from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return content_of([type(tokenizer).__name__, rules, template, tokenizer.special_tokens_map])


def _sample(job: Job, units: Sequence[Unit]) -> Documents:
    """The first documents that stay."""
    for unit in units:
        for batch in read_unit(unit, stamp=job.stamps[unit.uri], batch_rows=SAMPLE):
            documents, _, _ = job.documents(batch)
            if len(documents):
                return documents
    return Documents.of([], np.zeros(0, np.int64))


def prepare_dataset(
    job: Job,
    manifest: Manifest,
    *,
    shards: str | Path,
    workers: int | None = None,
) -> Prepared:
    """Make the shards that are missing, the first one in this process.

    Raises UserError with the first error of any process, or when too many rows are bad, or none is left.
    """
    began = time.monotonic()
    find_duplicates(job, manifest)
    found: dict[int, Facts] = {}
    computed = 0
    with track("prepare", total=max(manifest.bytes, 1), unit=job.dataset.name) as advance:
        for number, facts, new in make_units(job, manifest, range(len(manifest.units)), shards=shards, workers=workers):
            found[number] = facts
            computed += new
            done = sum(_size(manifest.units[n]) for n in found) if len(found) < len(manifest.units) else manifest.bytes
            advance(max(done, 1), f"{job.dataset.name} · {sum(f['rows'] for f in found.values()):,} rows")
    made = [found[number] for number in range(len(manifest.units))]
    check_units(job, made)
    return Prepared(job.dataset.name, made, renderer_facts(job), time.monotonic() - began, computed)


def make_units(
    job: Job, manifest: Manifest, numbers: Iterable[int], *, shards: str | Path, workers: int | None = None
) -> Iterator[tuple[int, Facts, bool]]:
    """(number, facts, whether it was made now) of these units, first those that are there already."""
    units, store = manifest.units, ShardStore(shards)
    missing: list[int] = []
    for number in numbers:
        if (facts := store.facts(unit_key(job, number, units[number]))) is not None:
            yield number, facts, False
        else:
            missing.append(number)
    for number, facts in _build(job, units, missing, str(shards), workers or worker_count()):
        yield number, facts, True


def renderer_facts(job: Job) -> dict[str, Any]:
    """How the tokens were made, where it does not depend on which process made what."""
    return {name: job.renderer.facts()[name] for name in ("tokenizer", "tokenizer_reason", "plans")}


def find_duplicates(job: Job, manifest: Manifest) -> None:
    """With `dedup`, the rows that repeat an earlier one: a pass over all rows, before the first shard."""
    if not job.dataset.dedup:
        return

    def keys() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with track("repeated rows", total=len(manifest.units), unit=job.dataset.name) as advance:
            for number, unit in enumerate(manifest.units):
                read = [job.documents(b)[0] for b in read_unit(unit, stamp=job.stamps[unit.uri])]
                advance(number + 1)
                numbers = [np.zeros(0, np.int64), *(documents.numbers for documents in read)]
                hashes = [np.zeros(0, np.uint64), *(content_keys(documents) for documents in read)]
                yield np.concatenate(hashes), np.concatenate(numbers)

    job.duplicates = rows_to_drop(keys())


def check_units(job: Job, units: Sequence[Facts]) -> None:
    """Raise UserError when too many rows are bad, or none is left."""
    name = f"{job.where} ({job.dataset.name})"
    rows, bad = sum(u["rows"] for u in units), sum(u["bad_rows"] for u in units)
    if bad > job.pack.max_bad_rows * rows:
        first = next(row for unit in units for row in unit["bad"])
        field = f"field '{first['field']}': " if first["field"] else ""
        raise UserError(
            f"{name}: {first['file']}:{first['row']}: {field}{first['reason']} ({bad} of {rows} rows cannot be used; "
            f"pack.max_bad_rows allows a share of {job.pack.max_bad_rows:g})"
        )
    if not any("train" in unit["files"] for unit in units):
        left_out = sum((Counter(unit["filtered"]) for unit in units), Counter())
        why = ", ".join(f"{n}: {count}" for n, count in left_out.items()) or "the source has none"
        raise UserError(f"{name}: no row is left to train on ({rows} rows; left out: {why})")


def _size(unit: Unit) -> int:
    return max(unit.end - unit.start, 1)


def unit_key(job: Job, number: int, unit: Unit) -> str:
    """The name of the unit's shard."""
    return content_of(job.unit_inputs(number, unit))


def _build(
    job: Job, units: Sequence[Unit], missing: list[int], shards: str, workers: int
) -> Iterator[tuple[int, Facts]]:
    """Units as they are made: the first here, so that someone who waits for it does not wait for processes to start."""
    if not missing:
        return
    yield from _make(job, shards, units, missing[:1])
    tasks = _tasks(units, missing[1:])
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            yield from _make(job, shards, units, task)
        return
    with _processes(workers, job, shards, units) as pool:
        yield from _as_made(pool, tasks)


def _tasks(units: Sequence[Unit], numbers: list[int]) -> list[list[int]]:
    """Units that one process makes: pieces of one row group together, which is decoded only once then."""

    def group(number: int) -> Any:
        unit = units[number]
        whole = unit.row_group is None or unit.row_groups > 1
        return (number,) if whole else (unit.uri, unit.row_group)

    tasks: list[list[int]] = []
    for _, run in groupby(numbers, key=group):
        pieces = iter(sorted(run))
        while piece := list(islice(pieces, TOGETHER)):
            tasks.append(piece)
    return tasks


@contextmanager
def _processes(workers: int, job: Job, shards: str, units: Sequence[Unit]) -> Iterator[ProcessPoolExecutor]:
    """Forked from a fresh process without threads, that has imported everything once."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["controlllm.data.build", "transformers.tokenization_utils_fast"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(job, shards, list(units)))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _as_made(pool: ProcessPoolExecutor, tasks: list[list[int]]) -> Iterator[tuple[int, Facts]]:
    waiting: set[Future[list[tuple[int, Facts]]]] = {pool.submit(_work, task) for task in tasks}
    try:
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield from future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that prepares data was killed, most likely for want of memory; "
            "set CONTROLLLM_WORKERS to fewer processes or pack.unit_rows to fewer rows"
        ) from None


_here: tuple[Job, str, list[Unit]] | None = None


def _start(job: Job, shards: str, units: list[Unit]) -> None:
    global _here
    _here = (job, shards, units)


def _work(numbers: list[int]) -> list[tuple[int, Facts]]:
    assert _here is not None, "set when the process was started"
    job, shards, units = _here
    return list(_make(job, shards, units, numbers))


def _make(job: Job, shards: str, units: Sequence[Unit], numbers: list[int]) -> Iterator[tuple[int, Facts]]:
    """Build these units; one that another builder has in hand is waited for at the end."""
    store = ShardStore(shards)
    left: list[int] = []
    places = {units[number]: number for number in numbers}
    for unit, batches in read_units([units[number] for number in numbers], stamps=job.stamps):
        number = places[unit]
        key = unit_key(job, number, unit)
        with store.writing(key) as partial:
            if partial is None:
                left.append(number)
            elif (facts := store.facts(key)) is not None:  # made since we looked
                yield number, facts
            else:
                facts = job.build(number, unit, batches, partial, key)
                store.publish(key, partial, facts)
                yield number, facts
    for number in left:
        key = unit_key(job, number, units[number])
        while (facts := store.facts(key)) is None:
            with store.writing(key) as partial:
                if partial is not None:  # whoever had it is gone
                    break
            time.sleep(0.2)
        if facts is None:
            yield from _make(job, shards, units, [number])
        else:
            yield number, facts
