"""A task of an execution: from the catalog, or in pods, again after what another try may cure."""

import math
from pathlib import Path
from typing import Any

from flyteidl.core import literals_pb2

from backend import pods
from backend.catalog import Catalog, catalog_key
from backend.pods import Attempt, Ended
from backend.records import CACHE, ExecutionRecord, NodeRecord, end_attempt


class Tasks:
    def __init__(self, catalog: Catalog, folder: Path, variables: dict[str, str]):
        self.catalog, self.folder, self.variables = catalog, folder, variables

    def run(self, execution: ExecutionRecord, record: NodeRecord, task: Any, node: Any) -> Ended:
        """One task. The record says whether it came from the cache."""
        if not _cached(task, node):
            record.cached(CACHE.CACHE_DISABLED)
            return self._try(execution, record, task, record.inputs)
        found = catalog_key(task, record.inputs)
        ended, status = self._look_up(execution, found)
        if ended is None:
            ended = self._try(execution, record, task, record.inputs)
            if ended.outputs is not None:
                self.catalog.put(found, ended.outputs)
        record.cached(status)
        return ended

    def run_each(self, execution: ExecutionRecord, record: NodeRecord, task: Any, node: Any) -> Ended:
        """A map task: its inputs' lists item by item, each item cached by itself."""
        array, inputs = node.array_node, record.inputs
        lists = [name for name in inputs.literals if name not in array.bound_inputs]
        size = len(inputs.literals[lists[0]].collection.literals)
        ended = [self._item(execution, record, task, node, lists, index) for index in range(size)]
        good = [each for each in ended if each.outputs is not None]
        needed = array.min_successes or math.ceil((array.min_success_ratio or 1.0) * size)
        if len(good) < needed:
            return next(each for each in ended if each.outputs is None)
        outputs = literals_pb2.LiteralMap()
        for name in task.interface.outputs.variables:
            outputs.literals[name].collection.SetInParent()
            for each in ended:
                outputs.literals[name].collection.literals.append(_item_of(each, name))
        return Ended(outputs)

    def _item(
        self, execution: ExecutionRecord, record: NodeRecord, task: Any, node: Any, lists: list[str], index: int
    ) -> Ended:
        own = literals_pb2.LiteralMap()
        own.CopyFrom(record.inputs)
        for name in lists:
            own.literals[name].CopyFrom(record.inputs.literals[name].collection.literals[index])
        found = catalog_key(task, own)
        cached = _cached(task, node.array_node.node)
        ended, status = self._look_up(execution, found) if cached else (None, CACHE.CACHE_DISABLED)
        if ended is None:
            ended = self._try(execution, record, task, record.inputs, index=index)
            if cached and ended.outputs is not None:
                self.catalog.put(found, ended.outputs)
        else:
            end_attempt(record.attempt(task.id, 0))
        about = record.tasks[-1].closure.metadata.external_resources.add()
        about.index, about.cache_status = index, status
        about.phase = record.tasks[-1].closure.phase
        return ended

    def _look_up(self, execution: ExecutionRecord, found: str) -> tuple[Ended | None, Any]:
        if execution.message.spec.overwrite_cache:
            return None, CACHE.CACHE_SKIPPED
        outputs = self.catalog.get(found)
        return (None, CACHE.CACHE_POPULATED) if outputs is None else (Ended(outputs), CACHE.CACHE_HIT)

    def _try(
        self,
        execution: ExecutionRecord,
        record: NodeRecord,
        task: Any,
        inputs: literals_pb2.LiteralMap,
        index: int | None = None,
    ) -> Ended:
        """As often as the task's retries allow, while what was wrong may be gone the next time."""
        previous = ""
        for number in range(task.metadata.retries.retries + 1):
            place = self.folder / execution.name / record.name / (f"{index}-" if index is not None else "")
            attempt = Attempt(
                task,
                place.with_name(f"{place.name}{number}") if index is not None else place / str(number),
                self._names(execution, task, number, index),
                {pair.key: pair.value for pair in execution.message.spec.envs.values} | self.variables,
                previous,
            )
            message = record.attempt(task.id, number)
            execution.attempts.append(attempt)
            ended = pods.run(attempt, inputs)
            execution.attempts.remove(attempt)
            end_attempt(message, failed="" if ended.outputs is not None else ended.error)
            if ended.outputs is not None or not ended.recoverable or execution.aborted.is_set():
                break
            previous = str(attempt.folder / "checkpoint")
        return ended

    @staticmethod
    def _names(execution: ExecutionRecord, task: Any, number: int, index: int | None) -> dict[str, str]:
        own, of = execution.message.id, task.id
        names = {
            "FLYTE_INTERNAL_EXECUTION_PROJECT": own.project,
            "FLYTE_INTERNAL_EXECUTION_DOMAIN": own.domain,
            "FLYTE_INTERNAL_EXECUTION_ID": own.name,
            "FLYTE_INTERNAL_TASK_PROJECT": of.project,
            "FLYTE_INTERNAL_TASK_DOMAIN": of.domain,
            "FLYTE_INTERNAL_TASK_NAME": of.name,
            "FLYTE_INTERNAL_TASK_VERSION": of.version,
            "FLYTE_ATTEMPT_NUMBER": str(number),
        }
        if index is not None:
            names |= {"BATCH_JOB_ARRAY_INDEX_VAR_NAME": "TEST_ARRAY_INDEX", "TEST_ARRAY_INDEX": str(index)}
        return names


def _cached(task: Any, node: Any) -> bool:
    if node.metadata.WhichOneof("cacheable_value"):
        return node.metadata.cacheable
    return task.metadata.discoverable


def _item_of(ended: Ended, name: str) -> literals_pb2.Literal:
    """One item's output; nothing for an item that failed where not all have to succeed."""
    if ended.outputs is not None:
        return ended.outputs.literals[name]
    nothing = literals_pb2.Literal()
    nothing.scalar.none_type.SetInParent()
    return nothing
