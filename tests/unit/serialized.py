"""What Flyte would be sent under a cluster profile: `python serialized.py PROFILE... [+workflows]` prints it as JSON.

Tasks are built when they are imported, so each profile needs a process of its own; they are forked from one that has
loaded flytekit. Workflows take far longer than tasks, and are the same under each profile.
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
def serialized(*profiles: str, workflows: bool = False) -> dict[str, dict[str, Any]]:
    """profile → {"tasks": name → template, "workflows": name → the tasks of its nodes}; without workflows there are no
    map tasks either."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *profiles, *(["+workflows"] if workflows else [])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _in_a_fork(profile: str, packages: list[str]) -> dict[str, Any]:
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        os.environ["CONTROLLLM_PROFILE"] = profile
        with os.fdopen(write, "w") as stream:
            stream.write(json.dumps(_entities(packages)))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"{profile}: cannot be serialised")
    return json.loads(text)


def _entities(packages: list[str]) -> dict[str, Any]:
    from flytekit.configuration import Image, ImageConfig, SerializationSettings
    from flytekit.models.task import TaskSpec
    from flytekit.tools.repo import serialize_get_control_plane_entities
    from google.protobuf.json_format import MessageToDict

    for package in packages:
        for module in pkgutil.iter_modules([str(ROOT / package)]):
            importlib.import_module(f"{package}.{module.name}")
    images = [Image(name=name, fqn=f"registry.example/{name}", tag="1") for name in IMAGES]
    settings = SerializationSettings(
        image_config=ImageConfig(default_image=images[0], images=images), project="p", domain="d", version="1"
    )
    found: dict[str, Any] = {"tasks": {}, "workflows": {}}
    for entity in serialize_get_control_plane_entities(settings):
        message = MessageToDict(entity.to_flyte_idl())
        if "template" not in message:  # a launch plan
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

    chosen = [word for word in sys.argv[1:] if not word.startswith("+")]
    loaded = ["tasks", "workflows"] if "+workflows" in sys.argv else ["tasks"]
    print(json.dumps({profile: _in_a_fork(profile, loaded) for profile in chosen}))
