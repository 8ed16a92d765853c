"""Units to shards in several processes, forked from one that has imported everything once."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import groupby, islice
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np

from controlllm.data.job import Job
from controlllm.data.manifest import read_units
from controlllm.data.shard import Facts
from controlllm.data.shard_store import ShardStore
from controlllm.data.types import Unit
from controlllm.errors import UserError
from controlllm.fingerprint import content_of

# The tokenizers' own threads would stand in the way of the processes.
os.environ.setdefault("RAYON_NUM_THREADS", "1")

WORTH_PROCESSES_SECONDS = 8.0
"""Of work: less is done before processes have started."""
TOGETHER = 8
"""Units of one row group that a process makes in one pass over it."""


def worker_count() -> int:
    """`CONTROLLLM_WORKERS`, or the cores that this process may use."""
    asked = os.environ.get("CONTROLLLM_WORKERS")
    if asked is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not asked.isdigit() or not int(asked):
        raise UserError(f"CONTROLLLM_WORKERS: must be a number of processes, found {asked!r}")
    return int(asked)


def unit_key(job: Job, number: int, unit: Unit) -> str:
    """The name of the unit's shard."""
    return content_of(job.unit_inputs(number, unit))


def build_units(
    job: Job, units: Sequence[Unit], missing: list[int], shards: str, workers: int | None
) -> Iterator[tuple[int, Facts]]:
    """Units as they are made: the first here, so that someone who waits for it does not wait for processes to start.

    Without `workers` there are as many as `worker_count` says, if the first unit shows that they are worth starting.
    """
    if not missing:
        return
    began = time.perf_counter()
    first = list(_make(job, shards, units, missing[:1]))
    seconds = time.perf_counter() - began
    yield from first
    tasks = _tasks(units, missing[1:])
    if workers is None:
        left = seconds * sum(_weight(units[n]) for n in missing[1:]) / _weight(units[missing[0]])
        workers = worker_count() if left > WORTH_PROCESSES_SECONDS else 1
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            yield from _make(job, shards, units, task)
        return
    with _processes(workers, job, shards, units) as pool:
        yield from _as_made(pool, tasks)


def _weight(unit: Unit) -> int:
    """Rows where they are known, else bytes."""
    return unit.rows or max(unit.end - unit.start, 1)


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
    assert job.inputs, "hashed once, and not by every process"
    context = get_context("forkserver")
    context.set_forkserver_preload(["controlllm.data.workers", "transformers.tokenization_utils_fast"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(job, shards, list(units)))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _as_made(pool: ProcessPoolExecutor, tasks: list[list[int]]) -> Iterator[tuple[int, Facts]]:
    def results() -> Iterator[tuple[int, Facts]]:
        waiting: set[Future[list[tuple[int, Facts]]]] = {pool.submit(_work, task) for task in tasks}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield from future.result()

    return _told(results())


def _told(results: Iterator[Any]) -> Iterator[Any]:
    """A process that was killed says nothing itself."""
    try:
        yield from results
    except BrokenProcessPool:
        raise UserError(
            "a process that prepares data was killed, most likely for want of memory; "
            "set CONTROLLLM_WORKERS to fewer processes or pack.unit_rows to fewer rows"
        ) from None


_here: tuple[Job, str, list[Unit]] | None = None


def _start(job: Job, shards: str, units: list[Unit]) -> None:
    global _here
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _here = (job, shards, units)


def _leave_with_parent() -> None:
    """A parent that is killed leaves queues on which its processes would wait for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(numbers: list[int]) -> list[tuple[int, Facts]]:
    assert _here is not None, "set when the process was started"
    job, shards, units = _here
    return list(_make(job, shards, units, numbers))


def _keys(number: int) -> tuple[np.ndarray, np.ndarray]:
    assert _here is not None, "set when the process was started"
    job, _, units = _here
    return job.keys(units[number])


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


def unit_keys_in_order(job: Job, units: Sequence[Unit], workers: int) -> Iterator[Any]:
    """Keys and row numbers of each unit's documents."""
    if workers == 1 or len(units) < 4:
        yield from (job.keys(unit) for unit in units)
        return
    with _processes(workers, job, "", units) as pool:
        yield from _told(pool.map(_keys, range(len(units))))
