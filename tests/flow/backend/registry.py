"""What is registered: tasks, workflows, launch plans, and which version of a launch plan is active."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from flyteidl.admin import launch_plan_pb2, task_pb2, workflow_pb2
from flyteidl.core import identifier_pb2

from backend.values import START


class Key(NamedTuple):
    project: str
    domain: str
    name: str
    version: str


class Refused(Exception):
    """What a real admin answers with an error: the status's name, and why."""


class Registry:
    def __init__(self) -> None:
        self.tasks: dict[Key, task_pb2.TaskSpec] = {}
        self.workflows: dict[Key, workflow_pb2.WorkflowSpec] = {}
        self.launch_plans: dict[Key, launch_plan_pb2.LaunchPlanSpec] = {}
        self.active: dict[tuple[str, str, str], Key] = {}

    def add(self, kept: dict[Key, Any], request: Any) -> None:
        """Refused where the name and version stand for something else, or name what is not there."""
        found = key(request.id)
        if found in kept:
            same = kept[found] == request.spec
            raise Refused("ALREADY_EXISTS" if same else "INVALID_ARGUMENT", f"{found.name} {found.version} exists")
        if kept is self.workflows:
            self._check(request.spec)
        if kept is self.launch_plans and key(request.spec.workflow_id) not in self.workflows:
            raise Refused("NOT_FOUND", f"{request.spec.workflow_id.name} is not registered")
        kept[found] = request.spec

    def workflow_of(self, launch_plan: Any) -> workflow_pb2.WorkflowSpec:
        return self.workflows[key(self.launch_plans[key(launch_plan)].workflow_id)]

    def activate(self, identifier: Any, *, state: int) -> None:
        found = key(identifier)
        if found not in self.launch_plans:
            raise Refused("NOT_FOUND", f"{found.name} is not registered")
        if state == launch_plan_pb2.ACTIVE:
            self.active[found[:3]] = found
        elif self.active.get(found[:3]) == found:
            del self.active[found[:3]]

    def _check(self, spec: workflow_pb2.WorkflowSpec) -> None:
        """What a real admin's compiler looks at: all that is named is there, and every input is bound."""
        inner = {key(each.id) for each in spec.sub_workflows}
        for template in (spec.template, *spec.sub_workflows):
            known = {START, ""} | {node.id for node in all_nodes(template.nodes)}
            for node in all_nodes(template.nodes):
                for task in _tasks_of(node):
                    if key(task) not in self.tasks:
                        raise Refused("NOT_FOUND", f"{node.id} runs {task.name}, which is not registered")
                    needed = set(self.tasks[key(task)].template.interface.inputs.variables)
                    if missing := needed - {binding.var for binding in node.inputs}:
                        raise Refused("INVALID_ARGUMENT", f"{node.id} does not bind {sorted(missing)}")
                if node.workflow_node.HasField("sub_workflow_ref") and (
                    key(node.workflow_node.sub_workflow_ref) not in inner
                ):
                    raise Refused("NOT_FOUND", f"{node.id} runs a workflow that was not sent along")
                if missing := set(node.upstream_node_ids) - known:
                    raise Refused("INVALID_ARGUMENT", f"{node.id} waits for {sorted(missing)}")


def key(identifier: Any) -> Key:
    return Key(identifier.project, identifier.domain, identifier.name, identifier.version)


def identifier(kind: int, found: Key) -> identifier_pb2.Identifier:
    return identifier_pb2.Identifier(resource_type=kind, **found._asdict())


def all_nodes(nodes: Any) -> Iterator[Any]:
    """Those inside branches, too."""
    for node in nodes:
        yield node
        if node.WhichOneof("target") == "branch_node":
            block = node.branch_node.if_else
            yield from all_nodes([case.then_node for case in (block.case, *block.other)])
            if block.HasField("else_node"):
                yield from all_nodes([block.else_node])


def _tasks_of(node: Any) -> Iterator[Any]:
    kind = node.WhichOneof("target")
    if kind == "task_node":
        yield node.task_node.reference_id
    elif kind == "array_node":
        yield node.array_node.node.task_node.reference_id
