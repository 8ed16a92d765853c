"""What the engine writes down of executions: the messages that the admin hands out."""

import threading
from dataclasses import dataclass, field
from typing import Any

from flyteidl.admin import execution_pb2, node_execution_pb2, task_execution_pb2
from flyteidl.core import catalog_pb2, identifier_pb2, literals_pb2
from flyteidl.core import execution_pb2 as phases
from google.protobuf.timestamp_pb2 import Timestamp

NODE = phases.NodeExecution
TASK = phases.TaskExecution
WORKFLOW = phases.WorkflowExecution
CACHE = catalog_pb2.CatalogCacheStatus


@dataclass
class NodeRecord:
    """A node's execution, with its data and the tries of its task."""

    message: node_execution_pb2.NodeExecution
    parent: str = ""
    inputs: literals_pb2.LiteralMap = field(default_factory=literals_pb2.LiteralMap)
    outputs: literals_pb2.LiteralMap | None = None
    tasks: list[task_execution_pb2.TaskExecution] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.message.id.node_id

    def begin(self, *, inputs: literals_pb2.LiteralMap) -> None:
        self.inputs = inputs
        self.message.closure.phase = NODE.RUNNING
        self.message.closure.started_at.GetCurrentTime()

    def end(self, phase: Any, *, outputs: literals_pb2.LiteralMap | None = None, error: str = "") -> None:
        self.outputs = outputs
        closure = self.message.closure
        closure.phase = phase
        _stamp(closure)
        if error:
            closure.error.message = error
            closure.error.code = "Error"

    def cached(self, status: Any) -> None:
        self.message.closure.task_node_metadata.cache_status = status

    def attempt(self, task: identifier_pb2.Identifier, number: int) -> task_execution_pb2.TaskExecution:
        message = task_execution_pb2.TaskExecution()
        message.id.task_id.CopyFrom(task)
        message.id.node_execution_id.CopyFrom(self.message.id)
        message.id.retry_attempt = number
        message.closure.phase = TASK.RUNNING
        message.closure.task_type = "python-task"
        message.closure.created_at.GetCurrentTime()
        message.closure.started_at.GetCurrentTime()
        self.tasks.append(message)
        return message


@dataclass
class ExecutionRecord:
    """An execution, and all that is known of its nodes."""

    message: execution_pb2.Execution
    inputs: literals_pb2.LiteralMap
    outputs: literals_pb2.LiteralMap | None = None
    nodes: dict[str, NodeRecord] = field(default_factory=dict)
    recovered_from: "ExecutionRecord | None" = None
    ended: threading.Event = field(default_factory=threading.Event)
    aborted: threading.Event = field(default_factory=threading.Event)
    attempts: list[Any] = field(default_factory=list)
    """The pods that run now."""

    @property
    def name(self) -> str:
        return self.message.id.name

    def node(self, name: str, spec: str, *, parent: str = "", kind: str = "") -> NodeRecord:
        """A new node's execution; kind: parent or array."""
        message = node_execution_pb2.NodeExecution()
        message.id.node_id = name
        message.id.execution_id.CopyFrom(self.message.id)
        message.metadata.spec_node_id = spec
        message.metadata.is_parent_node = kind == "parent"
        message.metadata.is_array = kind == "array"
        message.closure.phase = NODE.QUEUED
        message.closure.created_at.GetCurrentTime()
        message.closure.updated_at.GetCurrentTime()
        record = self.nodes[name] = NodeRecord(message, parent)
        return record

    def end(self, phase: Any, *, outputs: literals_pb2.LiteralMap | None = None, error: str = "") -> None:
        self.outputs = outputs
        closure = self.message.closure
        closure.phase = phase
        _stamp(closure)
        if phase == WORKFLOW.ABORTED:
            closure.abort_metadata.cause = error
        elif error:
            closure.error.message = error
            closure.error.code = "Error"
        self.ended.set()


def end_attempt(message: task_execution_pb2.TaskExecution, *, failed: str = "") -> None:
    message.closure.phase = TASK.FAILED if failed else TASK.SUCCEEDED
    _stamp(message.closure)
    if failed:
        message.closure.error.message = failed
        message.closure.error.code = "Error"


def _stamp(closure: Any) -> None:
    now = Timestamp()
    now.GetCurrentTime()
    closure.updated_at.CopyFrom(now)
    started = closure.started_at
    if started.seconds:
        closure.duration.FromNanoseconds(max(now.ToNanoseconds() - started.ToNanoseconds(), 0))
