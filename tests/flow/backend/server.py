"""The backend as a whole, and its scheduler, whose clock a test moves."""

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
from croniter import croniter
from flyteidl.admin import execution_pb2
from flyteidl.core import identifier_pb2
from flyteidl.service import admin_pb2_grpc, dataproxy_pb2_grpc, signal_pb2_grpc

from backend.admin import MODES, Admin, Signals
from backend.engine import Engine
from backend.files import DataProxy, Files
from backend.records import ExecutionRecord
from backend.registry import Refused, Registry, identifier

PATIENT = [
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
]
"""Of a server: flytekit asks every 30 s whether it is still there, which gRPC by itself takes for an attack."""


class Backend:
    """variables: of every pod, over its own."""

    def __init__(self, folder: Path, variables: dict[str, str] | None = None):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.registry = Registry()
        self.files = Files(folder / "files")
        self.engine = Engine(self.registry, folder / "pods", variables or {})
        self.admin = Admin(self.registry, self.engine)
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=PATIENT)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self.admin, self._server)
        signal_pb2_grpc.add_SignalServiceServicer_to_server(Signals(self.engine), self._server)
        dataproxy_pb2_grpc.add_DataProxyServiceServicer_to_server(DataProxy(self.files), self._server)
        self.endpoint = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    @classmethod
    @contextmanager
    def running(cls, folder: Path, variables: dict[str, str] | None = None) -> Iterator["Backend"]:
        backend = cls(folder, variables)
        try:
            yield backend
        finally:
            backend.close()

    @property
    def config(self) -> Path:
        """As flytectl's: what FLYTECTL_CONFIG names."""
        file = self.folder / "config.yaml"
        file.write_text(f"admin:\n  endpoint: dns:///{self.endpoint}\n  insecure: true\n  authType: Pkce\n")
        return file

    @property
    def executions(self) -> dict[str, ExecutionRecord]:
        return self.admin.executions

    def wait(self, name: str, *, seconds: float = 600) -> ExecutionRecord:
        record = self.executions[name]
        assert record.ended.wait(seconds), f"{name} still runs after {seconds} s"
        return record

    def ticks(self, since: datetime, until: datetime) -> list[tuple[str, datetime, str]]:
        """What the scheduler launches between two moments: plan, time, and the execution's name, or why there is
        none."""
        due = []
        for found in self.registry.active.values():
            schedule = self.registry.launch_plans[found].entity_metadata.schedule
            if not schedule.WhichOneof("ScheduleExpression"):
                continue
            times = croniter(schedule.cron_schedule.schedule, since.astimezone(UTC))
            while (at := times.get_next(datetime)) <= until:
                due.append((at, found))
        return [(found.name, at, self._tick(found, at)) for at, found in sorted(due)]

    def _tick(self, found: object, at: datetime) -> str:
        schedule = self.registry.launch_plans[found].entity_metadata.schedule
        request = execution_pb2.ExecutionCreateRequest(project=found.project, domain=found.domain)
        request.spec.launch_plan.CopyFrom(identifier(identifier_pb2.LAUNCH_PLAN, found))
        request.spec.metadata.mode = MODES.SCHEDULED
        request.spec.metadata.scheduled_at.FromDatetime(at)
        if schedule.kickoff_time_input_arg:
            literal = request.inputs.literals[schedule.kickoff_time_input_arg]
            literal.scalar.primitive.datetime.FromDatetime(at)
        try:
            return self.admin.launch(request).id.name
        except Refused as refused:
            return f"skipped: {refused.args[1]}"

    def close(self) -> None:
        """Executions that still run are aborted: no pod outlives a test."""
        from backend.pods import stop

        for record in self.executions.values():
            record.aborted.set()
            for attempt in list(record.attempts):
                stop(attempt)
        self.engine.close()
        self._server.stop(None).wait()
        self.files.close()
