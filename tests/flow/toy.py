"""A workflow of tasks that fail as told, for what a backend does with it: retries, cache, gates, recovery."""

import os
import signal
from functools import partial
from pathlib import Path

from flytekit import Cache, conditional, map_task, task, wait_for_input, workflow

from controlllm.errors import Outage, UserError
from tasks.artifacts import one_line_errors


def note(folder: str, line: str) -> int:
    """Write down that a task ran; returns how often it has."""
    with Path(folder, "log").open("a") as log:
        log.write(f"{line}\n")
    return Path(folder, "log").read_text().splitlines().count(line)


@task(cache=Cache(version="1"))
def doubled(number: int, folder: str) -> int:
    note(folder, f"doubled {number}")
    return 2 * number


@task(retries=2)
@one_line_errors
def shaky(numbers: list[int], folder: str) -> int:
    """Its storage fails, then its machine; the third try succeeds."""
    times = note(folder, "shaky")
    if times == 1:
        raise Outage("the storage is away")
    if times == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return sum(numbers)


@task(retries=2)
@one_line_errors
def strict(number: int, sure: bool, folder: str) -> int:
    note(folder, "strict")
    if number < 0 and not Path(folder, "forgiving").exists():
        raise UserError(f"number: must not be negative, found {number}")
    return number if sure else 0


@workflow
def answered(number: int, folder: str) -> int:
    from datetime import timedelta

    sure = wait_for_input("approval", timeout=timedelta(minutes=10), expected_type=bool)
    return strict(number=number, sure=sure, folder=folder)


@workflow
def toy(numbers: list[int], ask: bool, folder: str) -> int:
    many = map_task(partial(doubled, folder=folder))(number=numbers)
    total = shaky(numbers=many, folder=folder)
    return (
        conditional("asked")
        .if_(ask.is_true())
        .then(answered(number=total, folder=folder))
        .else_()
        .then(strict(number=total, sure=True, folder=folder))
    )


@workflow
def once(number: int, folder: str) -> int:
    return doubled(number=number, folder=folder)
