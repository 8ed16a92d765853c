"""Runs begun: by a launch plan, or again: as before, from where one failed, from a stage on with what was before it."""

from collections.abc import Mapping, Sequence
from typing import Any

from flyteidl.admin.execution_pb2 import ExecutionRelaunchRequest
from flytekit.clients.raw import RawSynchronousFlyteClient
from flytekit.models.core.identifier import WorkflowExecutionIdentifier
from flytekit.remote import FlyteRemote

from controlllm.config import RunConfig
from controlllm.errors import UserError
from tasks.remote.diff import plain
from tasks.remote.facts import Run, identity_of, run_of

STARTS: dict[str, tuple[str, ...]] = {
    "prepare": ("base", "data"),
    "train": ("base", "data", "shards"),
    "consolidate": ("base", "data", "shards", "trained"),
    "benchmark": ("base", "data", "shards", "trained", "model"),
}
"""The stages that a run can begin with, and what it takes over: inputs of `finetune-from-STAGE`."""
MADE_BY = {
    "base": ("ingest", "base"),
    "data": ("ingest", "data"),
    "shards": ("prepare", "o0"),
    "trained": ("train", "o0"),
    "model": ("consolidate", "o0"),
}


def start(
    remote: FlyteRemote,
    name: str,
    recipe: str | None,
    *,
    overrides: Sequence[str],
    checkpoint: str,
    version: str | None,
) -> str:
    """A run of a launch plan, its newest version unless one is named; its own recipe where none is given."""
    from controlllm.config import load_config

    plan = remote.fetch_launch_plan(name=name, version=version)  # type: ignore[arg-type] - None is the newest
    inputs: dict[str, Any] = {"checkpoint": checkpoint} if checkpoint else {}
    if recipe is not None:
        inputs["config"] = _literal(load_config(recipe, *overrides))
    assert plan.interface is not None
    if unknown := sorted(set(inputs) - set(plan.interface.inputs)):
        raise UserError(f"{name}: takes no {unknown[0]}; its inputs are {', '.join(plan.interface.inputs)}")
    return remote.execute(plan, inputs=inputs).id.name


def recover(remote: FlyteRemote, name: str) -> str:
    """What succeeded is taken over; the rest runs. Returns the new run's name."""
    run = run_of(remote, name)
    if run.state not in ("failed", "aborted", "timed_out"):
        raise UserError(f"--recover: {name} is {run.state}; only what failed is recovered: use --relaunch or --from")
    return remote.client.recover_execution(identity_of(remote, name)).name


def relaunch(remote: FlyteRemote, name: str, *, again: bool) -> str:
    """The same launch plan and inputs. again: Flyte's cache is not asked; it then keeps what is made now."""
    request = ExecutionRelaunchRequest(id=identity_of(remote, name).to_flyte_idl(), overwrite_cache=again)
    # The client's own relaunch_execution, which calls this one, knows no overwrite_cache.
    return RawSynchronousFlyteClient.relaunch_execution(remote.client, request).id.name


def rerun_from(
    remote: FlyteRemote, name: str, stage: str, *, overrides: Sequence[str], version: str | None, again: bool
) -> str:
    """The run's outputs before `stage`, and from there on the run again, with settings changed by `overrides`.

    again: Flyte's cache is not asked. version: of what is registered; the run's own when left out.
    """
    if stage not in STARTS:
        raise UserError(f"--from {stage}: is none of {', '.join(STARTS)}; --relaunch begins at the beginning")
    run = run_of(remote, name)
    literals = _outputs(remote, run)
    missing = [each for each in STARTS[stage] if each not in literals]
    if missing:
        raise UserError(
            f"--from {stage}: {name} has no output of {MADE_BY[missing[0]][0]}; start earlier, or use --recover"
        )
    inputs: dict[str, Any] = {each: literals[each] for each in STARTS[stage]}
    inputs["config"] = _config(remote, run, overrides)
    plan = remote.fetch_launch_plan(name=f"finetune-from-{stage}", version=version or run.version)
    return remote.execute(plan, inputs=inputs, overwrite_cache=again or None).id.name


def _outputs(remote: FlyteRemote, run: Run) -> dict[str, Any]:
    """The folders that a run made, or was given, by their name as inputs of a later stage."""
    given = remote.client.get_execution_data(identity_of(remote, run.id)).full_inputs.literals
    found = {name: literal for name, literal in given.items() if name in MADE_BY}
    for name, (stage, output) in MADE_BY.items():
        for each in run.stages:
            if each.name == stage and each.depth == 0 and output in each.outputs:
                found[name] = _node_outputs(remote, run, each.id)[output]
    return found


def _node_outputs(remote: FlyteRemote, run: Run, node: str) -> Mapping[str, Any]:
    from flytekit.models.core.identifier import NodeExecutionIdentifier

    own = WorkflowExecutionIdentifier(remote.default_project, remote.default_domain, run.id)
    return remote.client.get_node_execution_data(NodeExecutionIdentifier(node, own)).full_outputs.literals


def _config(remote: FlyteRemote, run: Run, overrides: Sequence[str]) -> Any:
    """The run's recipe as it ran, with the time in its name if a schedule gave it one; UserError for a wrong change."""
    from controlllm.config import validate
    from controlllm.recipe import Source, apply

    dated = next((each for each in run.stages if each.name == "for_tick" and each.outputs), None)
    literals = remote.client.get_execution_data(identity_of(remote, run.id)).full_inputs.literals
    literal = _node_outputs(remote, run, dated.id)["o0"] if dated else literals.get("config")
    if literal is None:
        raise UserError(f"{run.id}: is no run of a recipe; use --relaunch")
    tree, source = apply(plain(literal), Source(file=f"the recipe of {run.id}"), *overrides)
    return _literal(validate(tree, source))


def _literal(config: RunConfig) -> Any:
    """As Flyte has it; of a message it cannot tell the type by itself."""
    from flytekit import FlyteContextManager
    from flytekit.core.type_engine import TypeEngine

    from tasks.artifacts import Recipe

    recipe = Recipe.model_validate(config.model_dump())
    return TypeEngine.to_literal(
        FlyteContextManager.current_context(), recipe, Recipe, TypeEngine.to_literal_type(Recipe)
    )
