"""What a backend knows of a run, as plain values."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from flytekit.clients.helpers import iterate_node_executions, iterate_task_executions
from flytekit.exceptions.user import FlyteEntityNotExistException
from flytekit.models.core.execution import NodeExecutionPhase, WorkflowExecutionPhase
from flytekit.models.core.identifier import ResourceType, WorkflowExecutionIdentifier
from flytekit.remote import FlyteRemote

CACHE = {1: "computed", 2: "cached", 3: "computed", 4: "cache unreachable", 5: "cache not written", 6: "computed anew"}
"""Flyte's cache statuses by number, which flytekit's models do not name; 0 is a task without a cache."""


@dataclass(frozen=True)
class Stage:
    """One node's execution; depth: how many workflows it is inside of."""

    id: str
    name: str
    depth: int
    state: str
    cache: str
    started: datetime | None
    seconds: float
    tries: int
    error: str
    deck: str
    outputs: Mapping[str, str]
    """What tells an output apart: a folder's content hash, or its place."""


@dataclass(frozen=True)
class Run:
    id: str
    plan: str
    version: str
    mode: str
    state: str
    created: datetime
    seconds: float
    error: str
    url: str
    stages: list[Stage] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.state not in ("queued", "running", "succeeding", "failing", "undefined")


def newest(remote: FlyteRemote, limit: int) -> list[Run]:
    """The newest runs, without their stages."""
    found, _ = remote.client.list_executions_paginated(
        remote.default_project, remote.default_domain, limit=limit, sort_by=_newest_first()
    )
    return [_run(remote, each) for each in found]


def run_of(remote: FlyteRemote, name: str) -> Run:
    """A run with all its stages, in the order in which they began; without stages, one that is a single task."""
    identity = identity_of(remote, name)
    execution = remote.client.get_execution(identity)
    launched = execution.spec.launch_plan
    if launched.resource_type == ResourceType.TASK:
        return _run(remote, execution)
    plan = remote.client.get_launch_plan(launched)
    closure = remote.client.get_workflow(plan.spec.workflow_id).closure.compiled_workflow
    workflows = {each.template.id.name: each.template for each in (closure.primary, *closure.sub_workflows)}
    nodes = {node.id: node for node in closure.primary.template.nodes}
    return _run(remote, execution, list(_stages(remote, identity, workflows, nodes)))


def identity_of(remote: FlyteRemote, name: str) -> WorkflowExecutionIdentifier:
    return WorkflowExecutionIdentifier(remote.default_project, remote.default_domain, name)


def first_line(message: str) -> str:
    """What a person needs of an error: the exception's own words, without the traceback before them.

    Of an input that flytekit cannot read also its exception, which stands behind the whole literal.
    """
    said = message.rpartition("Message:")[2].strip() or message.strip()
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [""]
    if not lines[0].endswith(":"):
        return lines[0]
    causes = [line for line in lines[1:] if line.startswith("Exception: ")]
    return " ".join([lines[0], *(causes or lines[1:])[:1]])


def _run(remote: FlyteRemote, execution: Any, stages: list[Stage] | None = None) -> Run:
    closure, spec = execution.closure, execution.spec
    aborted = closure.abort_metadata.cause if closure.abort_metadata else ""
    return Run(
        id=execution.id.name,
        plan=spec.launch_plan.name.rpartition(".")[2],
        version=spec.launch_plan.version,
        mode=_MODES.get(spec.metadata.mode, "?"),
        state=WorkflowExecutionPhase.enum_to_string(closure.phase).lower(),
        created=closure.created_at,
        seconds=closure.duration.total_seconds() if closure.duration else 0.0,
        error=first_line(closure.error.message if closure.error else aborted),
        url=remote.generate_console_url(execution.id),
        stages=stages or [],
    )


_MODES = {0: "by hand", 1: "schedule", 2: "system", 3: "relaunch", 4: "child", 5: "recover", 6: "trigger"}


def _stages(
    remote: FlyteRemote,
    identity: WorkflowExecutionIdentifier,
    workflows: Mapping[str, Any],
    nodes: Mapping[str, Any],
    parent: str | None = None,
    depth: int = 0,
) -> Iterator[Stage]:
    for execution in iterate_node_executions(remote.client, identity, unique_parent_id=parent):
        node = nodes.get(execution.metadata.spec_node_id or execution.id.node_id)
        if node is None:  # the backend's own first and last node
            continue
        yield _stage(remote, execution, node, depth)
        if execution.metadata.is_parent_node:
            inner = _inside(node, workflows)
            yield from _stages(remote, identity, workflows, inner, execution.id.node_id, depth + 1)


def _inside(node: Any, workflows: Mapping[str, Any]) -> dict[str, Any]:
    """The nodes that run in a node: of a workflow, or of a branch."""
    if node.workflow_node is not None:
        return {each.id: each for each in workflows[node.workflow_node.sub_workflow_ref.name].nodes}
    block = node.branch_node.if_else
    taken = [block.case.then_node, *(case.then_node for case in block.other or []), block.else_node]
    return {each.id: each for each in taken if each is not None}


def _stage(remote: FlyteRemote, execution: Any, node: Any, depth: int) -> Stage:
    closure = execution.closure
    tasks = []
    if node.task_node is not None or node.array_node is not None:
        tasks = list(iterate_task_executions(remote.client, execution.id))
    status = closure.task_node_metadata.cache_status if closure.task_node_metadata else 0
    return Stage(
        id=execution.id.node_id,
        name=name_of(node),
        depth=depth,
        state=NodeExecutionPhase.enum_to_string(closure.phase).lower(),
        cache=_cache_of(node, status, tasks),
        started=closure.started_at,
        seconds=closure.duration.total_seconds() if closure.duration else 0.0,
        tries=len(tasks) if node.array_node is None else 0,
        error=first_line(closure.error.message) if closure.error else "",
        deck=closure.deck_uri or "",
        outputs={name: mark(literal) for name, literal in _outputs(remote, execution).items()},
    )


def _outputs(remote: FlyteRemote, execution: Any) -> Mapping[str, Any]:
    """Literals by name; none of a node that has only been queued, of which a backend may know nothing."""
    try:
        return remote.client.get_node_execution_data(execution.id).full_outputs.literals
    except FlyteEntityNotExistException:
        return {}


_MAPPED = re.compile(r"^(?:.*\.)?map_(\w+)_[0-9a-f]{32}-arraynode$")


def name_of(node: Any) -> str:
    """A task's or workflow's own name, a mapped task's too, or what a branch or a gate is called."""
    if node.task_node is not None:
        return node.task_node.reference_id.name.rpartition(".")[2]
    if node.workflow_node is not None:
        return node.workflow_node.sub_workflow_ref.name.rpartition(".")[2]
    return _MAPPED.sub(r"\1", node.metadata.name)


def mark(literal: Any) -> str:
    """A short text that is equal where two literals are."""
    if literal.hash:
        return literal.hash
    scalar = literal.scalar
    if scalar is not None and scalar.blob is not None:
        return scalar.blob.uri
    return literal.to_flyte_idl().SerializeToString(deterministic=True).hex()


def _cache_of(node: Any, status: int, tasks: list[Any]) -> str:
    if node.array_node is None:
        return CACHE.get(status, "")
    items = [each for task in tasks if task.closure.metadata for each in task.closure.metadata.external_resources]
    cached = sum(each.cache_status == 2 for each in items)
    return f"{cached} of {len(items)} cached"


def _newest_first() -> Any:
    from flytekit.models.admin.common import Sort

    return Sort(key="created_at", direction=Sort.Direction.DESCENDING)
