"""Runs a registered workflow node by node: promises bound, branches taken, gates waited for, outputs cached."""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flyteidl.core import literals_pb2

from backend.catalog import Catalog
from backend.records import NODE, WORKFLOW, ExecutionRecord, NodeRecord
from backend.registry import Registry, all_nodes, key
from backend.tasks import Tasks
from backend.values import START, bound, holds


class Failed(Exception):
    """A node that ends the execution: its name, and what was wrong."""


@dataclass
class Scope:
    """A workflow, or one inside it, while it runs."""

    execution: ExecutionRecord
    templates: dict[Any, Any]
    """Those that nodes can name."""
    parent: NodeRecord | None = None
    made: dict[str, Any] = field(default_factory=dict)

    def name(self, node_id: str) -> str:
        return node_id if self.parent is None else f"{self.parent.name}-0-{node_id}"

    def record(self, node: Any, *, kind: str = "") -> NodeRecord:
        parent = self.parent.name if self.parent else ""
        return self.execution.node(self.name(node.id), node.id, parent=parent, kind=kind)


class Engine:
    """folder: in which every try of every task has a folder of its own."""

    def __init__(self, registry: Registry, folder: Path, variables: dict[str, str]):
        self.registry = registry
        self.catalog = Catalog()
        self.tasks = Tasks(self.catalog, folder, variables)
        self.signals: dict[tuple[str, str], literals_pb2.Literal | None] = {}
        self._pool = ThreadPoolExecutor(4)

    def start(self, execution: ExecutionRecord) -> None:
        self._pool.submit(self._run, execution)

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _run(self, execution: ExecutionRecord) -> None:
        execution.message.closure.phase = WORKFLOW.RUNNING
        execution.message.closure.started_at.GetCurrentTime()
        try:
            outputs = self._entity(execution)
        except Failed as failure:
            aborted = execution.aborted.is_set()
            execution.end(WORKFLOW.ABORTED if aborted else WORKFLOW.FAILED, error=str(failure))
        except BaseException as error:
            execution.end(WORKFLOW.FAILED, error=f"the test's engine: {type(error).__name__}: {error}")
            raise
        else:
            execution.end(WORKFLOW.SUCCEEDED, outputs=outputs)

    def _entity(self, execution: ExecutionRecord) -> literals_pb2.LiteralMap:
        spec = self.registry.workflow_of(execution.message.spec.launch_plan)
        templates = {key(each.id): each for each in (spec.template, *spec.sub_workflows)}
        return self._workflow(Scope(execution, templates), spec.template, execution.inputs)

    def _workflow(self, scope: Scope, template: Any, inputs: literals_pb2.LiteralMap) -> literals_pb2.LiteralMap:
        scope.made[START] = inputs.literals
        for node in in_order(template.nodes):
            scope.made[node.id] = self._node(scope, node).literals
        return bound(template.outputs, scope.made)

    def _node(self, scope: Scope, node: Any) -> literals_pb2.LiteralMap:
        kind = node.WhichOneof("target")
        shown = {"array_node": "array", "branch_node": "parent", "workflow_node": "parent"}.get(kind, "")
        record = scope.record(node, kind=shown)
        if (before := _recovered(scope.execution, record)) is not None:
            return before
        if scope.execution.aborted.is_set():
            record.end(NODE.ABORTED)
            raise Failed("aborted")
        record.begin(inputs=bound(node.inputs, scope.made))
        steps: dict[str, Callable[..., literals_pb2.LiteralMap]] = {
            "task_node": self._task,
            "array_node": self._array,
            "branch_node": self._branch,
            "workflow_node": self._inner,
            "gate_node": self._gate,
        }
        try:
            outputs = steps[kind](scope, node, record)
        except Failed as failure:
            record.end(NODE.ABORTED if scope.execution.aborted.is_set() else NODE.FAILED, error=str(failure))
            raise
        record.end(NODE.SUCCEEDED, outputs=outputs)
        return outputs

    def _task(self, scope: Scope, node: Any, record: NodeRecord) -> literals_pb2.LiteralMap:
        task = self.registry.tasks[key(node.task_node.reference_id)].template
        ended = self.tasks.run(scope.execution, record, task, node)
        return _outputs(record, ended)

    def _array(self, scope: Scope, node: Any, record: NodeRecord) -> literals_pb2.LiteralMap:
        task = self.registry.tasks[key(node.array_node.node.task_node.reference_id)].template
        ended = self.tasks.run_each(scope.execution, record, task, node)
        return _outputs(record, ended)

    def _inner(self, scope: Scope, node: Any, record: NodeRecord) -> literals_pb2.LiteralMap:
        template = scope.templates[key(node.workflow_node.sub_workflow_ref)]
        return self._workflow(Scope(scope.execution, scope.templates, record), template, record.inputs)

    def _branch(self, scope: Scope, node: Any, record: NodeRecord) -> literals_pb2.LiteralMap:
        block = node.branch_node.if_else
        inputs = record.inputs.literals
        taken = next((case.then_node for case in (block.case, *block.other) if holds(case.condition, inputs)), None)
        if taken is None and block.WhichOneof("default") == "error":
            raise Failed(block.error.message)
        inner = Scope(scope.execution, scope.templates, record, scope.made)
        return self._node(inner, taken if taken is not None else block.else_node)

    def _gate(self, scope: Scope, node: Any, record: NodeRecord) -> literals_pb2.LiteralMap:
        gate = node.gate_node
        condition = getattr(gate, gate.WhichOneof("condition"))
        signal = (scope.execution.name, condition.signal_id)
        self.signals.setdefault(signal, None)
        until = time.monotonic() + (node.metadata.timeout.ToTimedelta().total_seconds() or 1e9)
        while (value := self.signals[signal]) is None:
            if scope.execution.aborted.wait(0.05):
                raise Failed("aborted")
            if time.monotonic() > until:
                raise Failed(f"{condition.signal_id}: nobody answered in time")
        if gate.WhichOneof("condition") == "approve":
            if not value.scalar.primitive.boolean:
                raise Failed(f"{condition.signal_id}: refused")
            return record.inputs
        outputs = literals_pb2.LiteralMap()
        outputs.literals[condition.output_variable_name].CopyFrom(value)
        return outputs


def in_order(nodes: Iterable[Any]) -> list[Any]:
    """Every node after all that it needs."""
    left, done, found = list(nodes), {START, ""}, []
    while left:
        ready = next((node for node in left if needs(node) <= done), None)
        assert ready is not None, f"nodes wait for each other: {[node.id for node in left]}"
        left.remove(ready)
        done.add(ready.id)
        found.append(ready)
    return found


def needs(node: Any) -> set[str]:
    """The nodes that one waits for; a branch, for those of all its ways, too."""
    return {each for inner in all_nodes([node]) for each in inner.upstream_node_ids}


def _outputs(record: NodeRecord, ended: Any) -> literals_pb2.LiteralMap:
    if ended.deck:
        record.message.closure.deck_uri = str(ended.deck)
    if ended.outputs is None:
        raise Failed(f"[{record.name}]: {ended.error}")
    return ended.outputs


def _recovered(execution: ExecutionRecord, record: NodeRecord) -> literals_pb2.LiteralMap | None:
    """What the same node of the execution that is recovered made."""
    before = execution.recovered_from.nodes.get(record.name) if execution.recovered_from else None
    if before is None or before.message.closure.phase not in (NODE.SUCCEEDED, NODE.RECOVERED):
        return None
    record.begin(inputs=before.inputs)
    record.end(NODE.RECOVERED, outputs=before.outputs)
    return before.outputs


def wait_for(condition: Callable[[], bool], *, seconds: float) -> None:
    """For tests: until something holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"still not so after {seconds} s"
        threading.Event().wait(0.1)
