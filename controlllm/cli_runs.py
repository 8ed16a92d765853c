"""`controlllm runs`: the commands of `tasks.remote`, which talk to Flyte, in a process of their own.

Nothing here imports flytekit, and the other commands do not wait for it.
"""

import subprocess
import sys

import typer

ANY = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def add_commands(app: typer.Typer) -> None:
    app.command("runs", context_settings=ANY, rich_help_panel="On a cluster", add_help_option=False)(runs)


def runs(context: typer.Context) -> None:
    """Runs on Flyte: start, ls, show, diff, rerun, approve.

    Example: `controlllm runs ls`

    Next: `controlllm runs show RUN`
    """
    done = subprocess.run([sys.executable, "-m", "tasks.remote", *context.args])  # noqa: S603 - no shell
    raise typer.Exit(done.returncode)
