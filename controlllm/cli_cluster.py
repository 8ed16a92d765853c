"""Commands of clusters: which profiles there are, what a profile asks for, and its registration with Flyte."""

import os
from typing import Annotated

import typer

from controlllm.errors import UserError

Chosen = Annotated[
    str | None,
    typer.Option("--profile", "-p", metavar="NAME|FILE", help="Of k8s/profiles, or a file; else CONTROLLLM_PROFILE."),
]
PANEL = "On a cluster"


def add_commands(app: typer.Typer) -> None:
    cluster = typer.Typer(help="Run on Flyte: profiles, show, register.", rich_markup_mode="markdown")
    cluster.command("profiles")(profiles)
    cluster.command("show")(show)
    cluster.command("register")(register)
    app.add_typer(cluster, name="cluster", rich_help_panel=PANEL)


def profiles() -> None:
    """List the cluster profiles of k8s/profiles.

    Example: `controlllm cluster profiles`

    Next: `controlllm cluster show --profile one-gpu`
    """
    from controlllm.cluster_table import print_profiles

    print_profiles()


def show(profile: Chosen = None) -> None:
    """Print what each task of a run would ask a cluster for.

    Example: `controlllm cluster show --profile multi-node`

    Next: `controlllm cluster register --profile multi-node --version 1 --image train=...`
    """
    from controlllm.cluster_table import print_pods
    from controlllm.config.cluster import load_profile

    print_pods(load_profile(profile))


def register(
    version: Annotated[str, typer.Option("--version", "-v", help="Registered as VERSION-PROFILE.")],
    profile: Chosen = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", metavar="NAME=REFERENCE", help="cpu=..., train=..., serve=...; of each once."),
    ] = None,
    project: Annotated[str | None, typer.Option("--project", help="Flyte's; else that of its configuration.")] = None,
    domain: Annotated[str | None, typer.Option("--domain", help="Such as development.")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", metavar="FILE", help="What the launch plans run, by the clock too.")
    ] = None,
    activate: Annotated[bool, typer.Option("--activate", help="The launch plans' schedules begin.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build everything and send nothing.")] = False,
) -> None:
    """Register all tasks and workflows under a profile; prints the pyflyte command that it runs.

    Where Flyte is stands in its own configuration (FLYTECTL_CONFIG, or ~/.flyte/config.yaml).

    Example: `controlllm cluster register --profile local --version 1 --image cpu=registry.example/cpu:1 --dry-run`

    Example: `controlllm cluster register -p multi-node -v 2 -r RECIPE --activate -i cpu=... -i train=... -i serve=...`

    Next: `controlllm runs ls`, or the console
    """
    from controlllm.config.cluster import VARIABLE, load_profile
    from controlllm.register import register as run
    from controlllm.register import registration

    chosen = profile or os.environ.get(VARIABLE)
    if chosen is None:
        raise UserError(f"--profile: name the cluster (controlllm cluster profiles), or set {VARIABLE}")
    loaded = load_profile(chosen)
    if chosen.endswith((".yaml", ".yml")):
        chosen = os.path.abspath(chosen)  # pyflyte runs elsewhere
    wanted = registration(
        loaded,
        chosen,
        version=version,
        images=image or [],
        project=project,
        domain=domain,
        recipe=recipe,
        activate=activate,
        dry_run=dry_run,
    )
    print(wanted, flush=True)
    run(wanted)
