"""Launch plans: the pipeline by the clock and on demand, a weekly benchmark, a smoke test, and every stage by itself.

What they run is the recipe that CONTROLLLM_RECIPE names at registration; when, and who hears of it, says the profile's
`launch` section. Without a recipe there is nothing to run by the clock, and the other plans ask for one.
"""

import os
from datetime import datetime
from typing import Any

from flytekit import CronSchedule, Email, Labels, LaunchPlan, PagerDuty, Slack, Workflow, workflow
from flytekit.core.base_task import PythonTask
from flytekit.core.notification import Notification
from flytekit.models.concurrency import ConcurrencyLimitBehavior, ConcurrencyPolicy
from flytekit.models.core.execution import WorkflowExecutionPhase

from controlllm.config import load_config
from tasks import cluster
from tasks.artifacts import Recipe
from tasks.benchmark import benchmark
from tasks.consolidate import consolidate
from tasks.dial import dial
from tasks.ingest import ingest
from tasks.prepare import prepare
from tasks.probe import probe
from tasks.promote import promote
from tasks.report import report
from tasks.schedule import for_tick
from tasks.smoke import smoke
from tasks.train import train
from workflows.assess import assess, smoke_test
from workflows.finetune import (
    Finetuned,
    finetune,
    from_benchmark,
    from_consolidate,
    from_prepare,
    from_train,
    pipeline,
)

RECIPE = "CONTROLLLM_RECIPE"
STAGES = (ingest, prepare, train, consolidate, benchmark, smoke, dial, probe, report, promote)
STARTS = {"prepare": from_prepare, "train": from_train, "consolidate": from_consolidate, "benchmark": from_benchmark}
PHASES = {
    "succeeded": WorkflowExecutionPhase.SUCCEEDED,
    "failed": WorkflowExecutionPhase.FAILED,
    "timed_out": WorkflowExecutionPhase.TIMED_OUT,
    "aborted": WorkflowExecutionPhase.ABORTED,
}


@workflow
def finetune_at(config: Recipe, kickoff: datetime) -> Finetuned:
    """`finetune` under a name with the tick's time; sources are looked at again, and what did not change is cached."""
    return pipeline(for_tick(config=config, kickoff=kickoff), fresh=True)


def alone(stage: PythonTask) -> Workflow:
    """A workflow of one stage, with its inputs and outputs."""
    name = stage.name.rpartition(".")[2]
    flow = Workflow(name=f"workflows.launch.{name}")
    given = {key: flow.add_workflow_input(key, kind) for key, kind in stage.python_interface.inputs.items()}
    node = flow.add_entity(stage, **given)
    for key in stage.python_interface.outputs:
        flow.add_workflow_output(key, node.outputs[key])
    return flow


def plan(name: str, of: Any, **settings: Any) -> LaunchPlan:
    """One run of it at a time: what comes while it runs is skipped."""
    return LaunchPlan.get_or_create(
        of,
        name=name,
        concurrency=ConcurrencyPolicy(max_concurrency=1, behavior=ConcurrencyLimitBehavior.SKIP),
        notifications=_notifications(),
        labels=Labels(cluster.queue_labels(cluster.profile().train.queue)),  # a PyTorchJob has those of its execution
        **settings,
    )


def _notifications() -> list[Notification]:
    notify = cluster.profile().launch.notify
    phases = [PHASES[name] for name in notify.on]
    kinds = ((Email, notify.email), (Slack, notify.slack), (PagerDuty, notify.pagerduty))
    return [kind(phases=phases, recipients_email=to) for kind, to in kinds if to]


def _recipe() -> dict[str, Any]:
    file = os.environ.get(RECIPE)
    return {"config": Recipe.model_validate(load_config(file).model_dump())} if file else {}


on_demand = plan("finetune-on-demand", finetune, default_inputs=_recipe())
smoke_plan = plan("smoke", smoke_test, default_inputs=_recipe())
from_stage = {name: plan(f"finetune-from-{name}", flow) for name, flow in STARTS.items()}
alone_by_stage = {stage.name.rpartition(".")[2]: alone(stage) for stage in STAGES}
by_stage = {name: plan(f"stage-{name}", flow) for name, flow in alone_by_stage.items()}

if _recipe():
    when = cluster.profile().launch
    nightly = plan(
        "finetune-nightly",
        finetune_at,
        fixed_inputs=_recipe(),
        schedule=CronSchedule(schedule=when.nightly, kickoff_time_input_arg="kickoff"),
    )
    weekly = plan("benchmark-weekly", assess, fixed_inputs=_recipe(), schedule=CronSchedule(schedule=when.weekly))
