"""The admin's gRPC service: registration, launching, and what is asked about executions."""

import secrets
from typing import Any

from flyteidl.admin import (
    execution_pb2,
    launch_plan_pb2,
    project_pb2,
    signal_pb2,
    task_pb2,
    version_pb2,
    workflow_pb2,
)
from flyteidl.core import identifier_pb2, literals_pb2
from flyteidl.service import admin_pb2_grpc, signal_pb2_grpc

from backend.answers import answer
from backend.engine import Engine
from backend.queries import Queries
from backend.records import ExecutionRecord
from backend.registry import Refused, Registry, key

MODES = execution_pb2.ExecutionMetadata


class Admin(Queries, admin_pb2_grpc.AdminServiceServicer):
    def __init__(self, registry: Registry, engine: Engine):
        self.registry, self.engine = registry, engine
        self.executions: dict[str, ExecutionRecord] = {}

    @answer
    def GetVersion(self, request: Any) -> Any:
        return version_pb2.GetVersionResponse(control_plane_version=version_pb2.Version(Version="v1.16.8"))

    @answer
    def ListProjects(self, request: Any) -> Any:
        return project_pb2.Projects()

    @answer
    def CreateTask(self, request: Any) -> Any:
        self.registry.add(self.registry.tasks, request)
        return task_pb2.TaskCreateResponse()

    @answer
    def CreateWorkflow(self, request: Any) -> Any:
        self.registry.add(self.registry.workflows, request)
        return workflow_pb2.WorkflowCreateResponse()

    @answer
    def CreateLaunchPlan(self, request: Any) -> Any:
        self.registry.add(self.registry.launch_plans, request)
        return launch_plan_pb2.LaunchPlanCreateResponse()

    @answer
    def UpdateLaunchPlan(self, request: Any) -> Any:
        self.registry.activate(request.id, state=request.state)
        return launch_plan_pb2.LaunchPlanUpdateResponse()

    @answer
    def CreateExecution(self, request: Any) -> Any:
        return self.launch(request)

    @answer
    def RelaunchExecution(self, request: Any) -> Any:
        before = self.found(request.id.name)
        again = self._again(before, request, MODES.RELAUNCH)
        again.spec.overwrite_cache = request.overwrite_cache
        return self.launch(again)

    @answer
    def RecoverExecution(self, request: Any) -> Any:
        before = self.found(request.id.name)
        return self.launch(self._again(before, request, MODES.RECOVERED), recovered_from=before)

    @answer
    def TerminateExecution(self, request: Any) -> Any:
        from backend.pods import stop

        record = self.found(request.id.name)
        record.message.closure.abort_metadata.cause = request.cause
        record.aborted.set()
        for attempt in list(record.attempts):
            stop(attempt)
        return execution_pb2.ExecutionTerminateResponse()

    def launch(self, request: Any, *, recovered_from: ExecutionRecord | None = None) -> Any:
        """A new execution, which starts at once. Refused by the launch plan's concurrency, or for wrong inputs."""
        spec = request.spec
        if spec.launch_plan.resource_type == identifier_pb2.TASK:
            raise Refused("UNIMPLEMENTED", "single tasks have launch plans of their own")
        plan = self.registry.launch_plans.get(key(spec.launch_plan))
        if plan is None:
            raise Refused("NOT_FOUND", f"{spec.launch_plan.name} {spec.launch_plan.version} is not registered")
        self._refuse_too_many(spec.launch_plan, plan)
        name = request.name or f"f{secrets.token_hex(9)}"
        if name in self.executions:
            raise Refused("ALREADY_EXISTS", name)
        message = execution_pb2.Execution(spec=spec)
        message.id.project, message.id.domain, message.id.name = request.project, request.domain, name
        message.closure.workflow_id.CopyFrom(plan.workflow_id)
        message.closure.created_at.GetCurrentTime()
        message.closure.updated_at.GetCurrentTime()
        record = ExecutionRecord(message, inputs_of(plan, request.inputs), recovered_from=recovered_from)
        self.executions[name] = record
        self.engine.start(record)
        return execution_pb2.ExecutionCreateResponse(id=message.id)

    def _refuse_too_many(self, wanted: Any, plan: Any) -> None:
        if not plan.HasField("concurrency_policy"):
            return
        running = [
            each.name
            for each in self.executions.values()
            if each.message.spec.launch_plan.name == wanted.name and not each.ended.is_set()
        ]
        if len(running) >= plan.concurrency_policy.max:
            raise Refused("RESOURCE_EXHAUSTED", f"{wanted.name}: {running[0]} is still running")

    @staticmethod
    def _again(before: ExecutionRecord, request: Any, mode: Any) -> Any:
        own = before.message.id
        made = execution_pb2.ExecutionCreateRequest(project=own.project, domain=own.domain, name=request.name)
        made.spec.CopyFrom(before.message.spec)
        made.spec.metadata.mode = mode
        made.spec.metadata.reference_execution.CopyFrom(own)
        made.inputs.CopyFrom(before.inputs)
        return made


def inputs_of(plan: Any, given: literals_pb2.LiteralMap) -> literals_pb2.LiteralMap:
    """Defaults, what was given, and what the launch plan fixes. Refused where one is missing, unknown or fixed."""
    inputs = literals_pb2.LiteralMap()
    parameters = plan.default_inputs.parameters
    for name, parameter in parameters.items():
        if parameter.HasField("default"):
            inputs.literals[name].CopyFrom(parameter.default)
    for name, literal in given.literals.items():
        fixed = plan.fixed_inputs.literals
        if name in fixed and fixed[name] != literal:
            raise Refused("INVALID_ARGUMENT", f"{name} is fixed by the launch plan")
        if name not in fixed and name not in parameters:
            raise Refused("INVALID_ARGUMENT", f"{name} is no input")
        inputs.literals[name].CopyFrom(literal)
    for name, literal in plan.fixed_inputs.literals.items():
        inputs.literals[name].CopyFrom(literal)
    if missing := set(parameters) - set(inputs.literals):
        raise Refused("INVALID_ARGUMENT", f"{sorted(missing)[0]} is missing")
    return inputs


class Signals(signal_pb2_grpc.SignalServiceServicer):
    """Answers to gates."""

    def __init__(self, engine: Engine):
        self.signals = engine.signals

    @answer
    def ListSignals(self, request: Any) -> Any:
        found = signal_pb2.SignalList()
        for (execution, name), value in self.signals.items():
            if execution == request.workflow_execution_id.name:
                signal = found.signals.add()
                signal.id.signal_id = name
                signal.id.execution_id.CopyFrom(request.workflow_execution_id)
                if value is not None:
                    signal.value.CopyFrom(value)
        return found

    @answer
    def SetSignal(self, request: Any) -> Any:
        name = (request.id.execution_id.name, request.id.signal_id)
        if name not in self.signals:
            raise Refused("NOT_FOUND", f"{request.id.signal_id} is not waited for")
        self.signals[name] = request.value
        return signal_pb2.SignalSetResponse()
