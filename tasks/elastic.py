"""Several training processes in a task, and what Flyte is told when one of them ends without a word."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException
from flytekit.extend import TaskPlugins
from flytekitplugins.kfpytorch import Elastic
from flytekitplugins.kfpytorch.task import PytorchElasticFunctionTask

from controlllm.errors import UserError
from tasks.artifacts import LOCAL_RUN, end_in_one_line, is_local
from tasks.live import live_deck

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


@dataclass
class Processes(Elastic):
    """As Elastic, with processes that were killed, or stopped because another was gone, tried again."""


class ProcessesTask(PytorchElasticFunctionTask):
    """Elastic knows a process's exception only: one that was killed is for it a mistake, never to be tried again."""

    def execute(self, **kwargs: Any) -> Any:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # seconds, for training alone

        try:
            with _told_that_it_is_local(), live_deck():
                return super().execute(**kwargs)
        except FlyteUserRuntimeException as error:
            failed = error.value
            if not isinstance(failed, ChildFailedError):
                raise
            rank, first = failed.get_first_failure()
            if not was_cut_off(first):
                kind, _, said = _words(first).partition(": ")
                if is_local() and kind == UserError.__name__ and "--debug" not in sys.argv:
                    end_in_one_line(said)
                raise
            said = f"rank {rank} was lost ({how_it_ended(first)}); what it wrote stands in its pod's log"
            raise FlyteRecoverableException(said, timestamp=first.timestamp) from None


@contextmanager
def _told_that_it_is_local() -> Iterator[None]:
    """Inside, processes that are started know of a local run; torch says nothing of those that fail, since what they
    say is said here.
    """
    if not is_local():
        yield
        return
    loggers = [logging.getLogger(name) for name in ("torch.distributed.elastic", "torch.multiprocessing")]
    before = [logger.level for logger in loggers]
    os.environ[LOCAL_RUN] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # flytekit would set it, and say so in eight lines
    try:
        for logger in loggers if "--debug" not in sys.argv else ():
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        del os.environ[LOCAL_RUN]


def _words(failure: "ProcessFailure") -> str:
    """Kind and text of the exception; torch has them in a dict, or has taken them out of it."""
    message: Any = failure.message
    return str(message["message"] if isinstance(message, dict) else message)


def was_cut_off(failure: "ProcessFailure") -> bool:
    """Whether a process ended without an exception of its own: by a signal, or by the watchdog of a run that hangs."""
    return not os.path.isfile(failure.error_file)


def how_it_ended(failure: "ProcessFailure") -> str:
    name = failure.signal_name()
    return name if failure.exitcode < 0 else f"exit code {failure.exitcode}"


TaskPlugins.register_pythontask_plugin(Processes, ProcessesTask)
