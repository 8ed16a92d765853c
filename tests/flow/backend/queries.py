"""What the admin answers about entities and executions."""

from typing import Any

from flyteidl.admin import (
    execution_pb2,
    launch_plan_pb2,
    node_execution_pb2,
    task_execution_pb2,
    task_pb2,
    workflow_pb2,
)
from flyteidl.core import identifier_pb2

from backend.answers import answer
from backend.records import ExecutionRecord, NodeRecord
from backend.registry import Key, Refused, Registry, all_nodes, identifier, key

TASK, WORKFLOW, PLAN = identifier_pb2.TASK, identifier_pb2.WORKFLOW, identifier_pb2.LAUNCH_PLAN


class Queries:
    registry: Registry
    executions: dict[str, ExecutionRecord]

    def found(self, name: str) -> ExecutionRecord:
        if name not in self.executions:
            raise Refused("NOT_FOUND", f"execution {name} is not here")
        return self.executions[name]

    def _node(self, identity: Any) -> NodeRecord:
        record = self.found(identity.execution_id.name).nodes.get(identity.node_id)
        if record is None:
            raise Refused("NOT_FOUND", f"{identity.node_id} has not begun")
        return record

    @answer
    def GetTask(self, request: Any) -> Any:
        return _task(request.id, _one(self.registry.tasks, request.id))

    @answer
    def ListTasks(self, request: Any) -> Any:
        kept = self.registry.tasks
        return task_pb2.TaskList(tasks=[_task(identifier(TASK, f), kept[f]) for f in _named(kept, request.id)])

    @answer
    def GetWorkflow(self, request: Any) -> Any:
        return self._workflow(request.id, _one(self.registry.workflows, request.id))

    @answer
    def ListWorkflows(self, request: Any) -> Any:
        kept = self.registry.workflows
        made = [self._workflow(identifier(WORKFLOW, found), kept[found]) for found in _named(kept, request.id)]
        return workflow_pb2.WorkflowList(workflows=made)

    @answer
    def GetLaunchPlan(self, request: Any) -> Any:
        return self._plan(key(request.id), _one(self.registry.launch_plans, request.id))

    @answer
    def ListLaunchPlans(self, request: Any) -> Any:
        kept = self.registry.launch_plans
        return launch_plan_pb2.LaunchPlanList(
            launch_plans=[self._plan(found, kept[found]) for found in _named(kept, request.id)]
        )

    @answer
    def GetActiveLaunchPlan(self, request: Any) -> Any:
        found = self.registry.active.get((request.id.project, request.id.domain, request.id.name))
        if found is None:
            raise Refused("NOT_FOUND", f"no version of {request.id.name} is active")
        return self._plan(found, self.registry.launch_plans[found])

    @answer
    def ListActiveLaunchPlans(self, request: Any) -> Any:
        plans = self.registry.launch_plans
        active = [found for found in self.registry.active.values() if found[:2] == (request.project, request.domain)]
        return launch_plan_pb2.LaunchPlanList(launch_plans=[self._plan(found, plans[found]) for found in active])

    @answer
    def GetExecution(self, request: Any) -> Any:
        return self.found(request.id.name).message

    @answer
    def ListExecutions(self, request: Any) -> Any:
        newest = [each.message for each in reversed(self.executions.values())]
        here = [each for each in newest if (each.id.project, each.id.domain) == (request.id.project, request.id.domain)]
        return execution_pb2.ExecutionList(executions=here[: request.limit or 100])

    @answer
    def GetExecutionData(self, request: Any) -> Any:
        record = self.found(request.id.name)
        return execution_pb2.WorkflowExecutionGetDataResponse(full_inputs=record.inputs, full_outputs=record.outputs)

    @answer
    def ListNodeExecutions(self, request: Any) -> Any:
        nodes = self.found(request.workflow_execution_id.name).nodes.values()
        found = [each.message for each in nodes if each.parent == request.unique_parent_id]
        return node_execution_pb2.NodeExecutionList(node_executions=found)

    @answer
    def GetNodeExecution(self, request: Any) -> Any:
        return self._node(request.id).message

    @answer
    def GetNodeExecutionData(self, request: Any) -> Any:
        record = self._node(request.id)
        return node_execution_pb2.NodeExecutionGetDataResponse(full_inputs=record.inputs, full_outputs=record.outputs)

    @answer
    def ListTaskExecutions(self, request: Any) -> Any:
        return task_execution_pb2.TaskExecutionList(task_executions=self._node(request.node_execution_id).tasks)

    @answer
    def GetTaskExecution(self, request: Any) -> Any:
        tasks = self._node(request.id.node_execution_id).tasks
        return next(each for each in tasks if each.id.retry_attempt == request.id.retry_attempt)

    @answer
    def GetTaskExecutionData(self, request: Any) -> Any:
        record = self._node(request.id.node_execution_id)
        return task_execution_pb2.TaskExecutionGetDataResponse(full_inputs=record.inputs, full_outputs=record.outputs)

    def _workflow(self, identity: Any, spec: Any) -> Any:
        """As compiled: with all tasks that are used anywhere in it."""
        made = workflow_pb2.Workflow(id=identity)
        compiled = made.closure.compiled_workflow
        compiled.primary.template.CopyFrom(spec.template)
        for template in spec.sub_workflows:
            compiled.sub_workflows.add().template.CopyFrom(template)
        used: dict[Key, Any] = {}
        for template in (spec.template, *spec.sub_workflows):
            for node in all_nodes(template.nodes):
                inner = node.array_node.node if node.WhichOneof("target") == "array_node" else node
                if inner.WhichOneof("target") == "task_node":
                    found = key(inner.task_node.reference_id)
                    used[found] = self.registry.tasks[found].template
        for task in used.values():
            compiled.tasks.add().template.CopyFrom(task)
        return made

    def _plan(self, found: Key, spec: Any) -> Any:
        made = launch_plan_pb2.LaunchPlan(id=identifier(PLAN, found), spec=spec)
        active = self.registry.active.get(found[:3]) == found
        made.closure.state = launch_plan_pb2.ACTIVE if active else launch_plan_pb2.INACTIVE
        made.closure.expected_inputs.CopyFrom(spec.default_inputs)
        outputs = self.registry.workflows[key(spec.workflow_id)].template.interface.outputs
        made.closure.expected_outputs.CopyFrom(outputs)
        return made


def _task(identity: Any, spec: Any) -> Any:
    made = task_pb2.Task(id=identity)
    made.closure.compiled_task.template.CopyFrom(spec.template)
    return made


def _one(kept: dict[Key, Any], wanted: Any) -> Any:
    if key(wanted) not in kept:
        raise Refused("NOT_FOUND", f"{wanted.name} {wanted.version} is not registered")
    return kept[key(wanted)]


def _named(kept: dict[Key, Any], wanted: Any) -> list[Key]:
    """All versions, the newest first."""
    return [each for each in reversed(kept) if each[:3] == (wanted.project, wanted.domain, wanted.name)]
