"""The commands of `controlllm runs`."""

import os
import sys
import time
from typing import Annotated

import typer

from controlllm.errors import UserError

app = typer.Typer(
    help="Runs on Flyte: start, ls, show, diff, rerun, approve.",
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
)
Endpoint = Annotated[
    str | None,
    typer.Option("--endpoint", metavar="HOST:PORT", help="Else Flyte's configuration (FLYTECTL_CONFIG)."),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="With --endpoint: without TLS.")]
Project = Annotated[str | None, typer.Option("--project", help="Flyte's; else FLYTE_DEFAULT_PROJECT.")]
Domain = Annotated[str | None, typer.Option("--domain", help="Else FLYTE_DEFAULT_DOMAIN, or development.")]
Name = Annotated[str, typer.Argument(metavar="RUN", help="As `controlllm runs ls` names it.")]
AsJson = Annotated[bool, typer.Option("--json", help="All facts, as JSON.")]


@app.command("ls")
def list_runs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=100, help="The newest of all plans.")] = 20,
    plan: Annotated[str | None, typer.Option("--plan", help="Of these, only a launch plan's.")] = None,
    state: Annotated[str | None, typer.Option("--state", help="Of these, only such as failed, running, ...")] = None,
    json_wanted: AsJson = False,
    endpoint: Endpoint = None,
    insecure: Insecure = False,
    project: Project = None,
    domain: Domain = None,
) -> None:
    """List runs, the newest first.

    Example: `controlllm runs ls --plan finetune-nightly --state failed`

    Next: `controlllm runs show RUN`
    """
    from tasks.remote.connect import Place, answers, connect
    from tasks.remote.facts import newest
    from tasks.remote.show import as_json, print_runs

    remote = connect(Place(endpoint, insecure, project, domain))
    with answers(remote, "runs"):
        found = newest(remote, limit)
    found = [run for run in found if plan in (None, run.plan) and state in (None, run.state)]
    if json_wanted:
        print(as_json(found))
    else:
        print_runs(found)


@app.command()
def show(
    run: Name,
    json_wanted: AsJson = False,
    endpoint: Endpoint = None,
    insecure: Insecure = False,
    project: Project = None,
    domain: Domain = None,
) -> None:
    """Show a run's stages: state, cached or computed, how long, what was wrong, and where to look.

    Example: `controlllm runs show RUN`

    Next: `controlllm runs rerun RUN --recover`, or `controlllm runs diff RUN OTHER`
    """
    from tasks.remote.connect import Place, answers, connect
    from tasks.remote.facts import run_of
    from tasks.remote.show import as_json, print_run

    remote = connect(Place(endpoint, insecure, project, domain))
    with answers(remote, run):
        found = run_of(remote, run)
    if json_wanted:
        print(as_json(found))
    else:
        print_run(found)


@app.command()
def diff(
    first: Name,
    second: Name,
    endpoint: Endpoint = None,
    insecure: Insecure = False,
    project: Project = None,
    domain: Domain = None,
) -> None:
    """Compare two runs: which settings differ, and which stages gave something else.

    Example: `controlllm runs diff RUN OTHER`

    Next: `controlllm runs rerun RUN --from train train.lr=1e-4`
    """
    from tasks.remote.connect import Place, answers, connect
    from tasks.remote.diff import print_diff

    remote = connect(Place(endpoint, insecure, project, domain))
    with answers(remote, f"{first}, {second}"):
        print_diff(remote, first, second)


@app.command()
def start(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="finetune-on-demand, smoke, benchmark-weekly, ...")],
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="Else that of the registration.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to it.")] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="For smoke and benchmark-weekly.")] = "",
    version: Annotated[str | None, typer.Option("--version", help="Registered; the newest by default.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it ends; exit code 1 if it fails.")] = False,
    endpoint: Endpoint = None,
    insecure: Insecure = False,
    project: Project = None,
    domain: Domain = None,
) -> None:
    """Start a run by its launch plan; prints the new run's name.

    Example: `controlllm runs start finetune-on-demand workflows/recipes/demo.yaml train.lr=1e-4`

    Next: `controlllm runs show RUN`
    """
    from tasks.remote.connect import Place, answers, connect
    from tasks.remote.rerun import start as begin

    remote = connect(Place(endpoint, insecure, project, domain))
    with answers(remote, plan):
        new = begin(remote, plan, recipe, overrides=overrides or [], checkpoint=checkpoint, version=version)
    print(new, flush=True)
    if wait:
        _wait(remote, new)


@app.command()
def rerun(
    run: Name,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="With --from: changes.")] = None,
    begin: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="prepare, train, consolidate or benchmark.")
    ] = None,
    recover: Annotated[bool, typer.Option("--recover", help="Take over what succeeded, run the rest.")] = False,
    relaunch: Annotated[bool, typer.Option("--relaunch", help="The same plan and inputs, from the beginning.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Not with --recover: compute what Flyte has cached.")] = False,
    version: Annotated[str | None, typer.Option("--version", help="With --from: registered; else the run's.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it ends; exit code 1 if it fails.")] = False,
    endpoint: Endpoint = None,
    insecure: Insecure = False,
    project: Project = None,
    domain: Domain = None,
) -> None:
    """Run a run again: --from a stage on, --recover from where it failed, or --relaunch; prints the new run's name.

    Example: `controlllm runs rerun RUN --from train train.lr=1e-4`

    Next: `controlllm runs show RUN`
    """
    if (begin is not None) + recover + relaunch != 1:
        raise UserError("rerun: say how, with one of --from STAGE, --recover and --relaunch")
    if begin is None and (overrides or version):
        raise UserError("rerun: KEY=VALUE and --version go with --from STAGE")
    if recover and again:
        raise UserError("rerun: --again goes with --from STAGE or --relaunch; --recover takes over what succeeded")
    from tasks.remote import rerun as ways
    from tasks.remote.connect import Place, answers, connect

    remote = connect(Place(endpoint, insecure, project, domain))
    with answers(remote, run):
        if begin is not None:
            new = ways.rerun_from(remote, run, begin, overrides=overrides or [], version=version, again=again)
        else:
            new = ways.recover(remote, run) if recover else ways.relaunch(remote, run, again=again)
    print(new, flush=True)
    if wait:
        _wait(remote, new)


@app.command()
def approve(
    run: Name,
    refuse: Annotated[bool, typer.Option("--refuse", help="The model is not promoted.")] = False,
    endpoint: Endpoint = None,
    insecure: Insecure = False,
    project: Project = None,
    domain: Domain = None,
) -> None:
    """Answer a run that waits for a person before its model is promoted.

    Example: `controlllm runs approve RUN`

    Next: `controlllm runs show RUN`
    """
    from tasks.remote.connect import Place, answers, connect

    remote = connect(Place(endpoint, insecure, project, domain))
    with answers(remote, f"approval of {run}"):
        remote.set_input("approval", run, not refuse)
    print(f"{run}: {'refused' if refuse else 'approved'}")


def _wait(remote: object, name: str) -> None:
    """Prints the run when it has ended; UserError if it did not succeed."""
    from tasks.remote.connect import answers
    from tasks.remote.facts import run_of
    from tasks.remote.show import failures, print_run

    while True:
        with answers(remote, name):  # type: ignore[arg-type]
            run = run_of(remote, name)  # type: ignore[arg-type]
        if run.done:
            break
        time.sleep(float(os.environ.get("CONTROLLLM_POLL_SECONDS", "10")))
    print_run(run)
    if run.state != "succeeded":
        raise UserError(f"{name}: {run.state}: {failures(run)[0] if failures(run) else 'see the console'}")


if __name__ == "__main__":
    from controlllm.cli import run_app

    sys.exit(run_app(app, sys.argv[1:], "controlllm runs"))
