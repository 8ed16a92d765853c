"""What Flyte would be sent under each cluster profile: `python serialized.py PROFILE...` prints it as JSON.

Tasks are built when they are imported, so each profile needs a process of its own; they are forked from one that has
loaded flytekit.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMAGES = ("cpu", "train", "serve")


@cache
def serialized(*profiles: str) -> dict[str, dict[str, Any]]:
    """profile → {"tasks": name → template, "workflows": name → the tasks of its nodes, "launch_plans": name → spec}."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *profiles],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _in_a_fork(profile: str) -> dict[str, Any]:
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        os.environ["CONTROLLLM_PROFILE"] = profile
        with os.fdopen(write, "w") as stream:
            stream.write(json.dumps(_entities()))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"{profile}: cannot be serialised")
    return json.loads(text)


def _entities() -> dict[str, Any]:
    from flytekit.configuration import Image, ImageConfig, SerializationSettings
    from flytekit.models.launch_plan import LaunchPlan
    from flytekit.models.task import TaskSpec
    from flytekit.tools.repo import serialize_get_control_plane_entities
    from google.protobuf.json_format import MessageToDict

    import workflows

    for module in pkgutil.iter_modules(workflows.__path__):
        importlib.import_module(f"workflows.{module.name}")
    images = [Image(name=name, fqn=f"registry.example/{name}", tag="1") for name in IMAGES]
    settings = SerializationSettings(
        image_config=ImageConfig(default_image=images[0], images=images), project="p", domain="d", version="1"
    )
    found: dict[str, Any] = {"tasks": {}, "workflows": {}, "launch_plans": {}}
    for entity in serialize_get_control_plane_entities(settings):
        message = MessageToDict(entity.to_flyte_idl())
        if isinstance(entity, LaunchPlan):
            found["launch_plans"][message["id"]["name"]] = message["spec"]
            continue
        template = message["template"]
        name = template["id"]["name"]
        if isinstance(entity, TaskSpec):
            inputs = template.get("interface", {}).get("inputs", {}).get("variables", {})
            found["tasks"][name] = template | {"interface": sorted(inputs)}
        else:
            nodes = template["nodes"]
            found["workflows"][name] = [n["taskNode"]["referenceId"]["name"] for n in nodes if "taskNode" in n]
    return found


if __name__ == "__main__":
    import flytekit  # noqa: F401 - once, for all forks
    import flytekitplugins.kfpytorch  # noqa: F401
    import kubernetes.client  # noqa: F401

    import controlllm.config  # noqa: F401

    print(json.dumps({profile: _in_a_fork(profile) for profile in sys.argv[1:]}))
