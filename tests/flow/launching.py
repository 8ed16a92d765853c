"""The project's commands and launch plans, against a backend of a test."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def controlllm(backend, *arguments):
    settings = {"FLYTECTL_CONFIG": str(backend.config), "TMPDIR": str(backend.folder), "FLYTE_DEFAULT_PROJECT": "p"}
    command = [sys.executable, "-m", "controlllm.cli", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **settings, "COLUMNS": "200"}
    )


def launch(backend, plan, of, **inputs):
    """By launch plan, from Python: `of` is the task or workflow whose inputs these are. Returns the run's name."""
    from flytekit import FlyteContextManager
    from flytekit.configuration import Config
    from flytekit.core.type_engine import TypeEngine
    from flytekit.remote import FlyteRemote
    from flytekit.types.directory import FlyteDirectory

    context = FlyteContextManager.current_context()
    literals = {}
    for name, value in inputs.items():
        kind = of.python_interface.inputs[name]
        value = FlyteDirectory(str(value), remote_directory=False) if isinstance(value, Path) else value
        literals[name] = TypeEngine.to_literal(context, value, kind, TypeEngine.to_literal_type(kind))
    config = Config.for_endpoint(backend.endpoint, insecure=True)
    remote = FlyteRemote(config, default_project="p", default_domain="development")
    return remote.execute(remote.fetch_launch_plan(name=plan), inputs=literals).id.name
