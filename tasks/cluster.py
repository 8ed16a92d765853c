"""Where a run happens: the cluster profile, read when the tasks are built.

`CONTROLLLM_PROFILE` is the name of a file in `k8s/profiles` or the path of one; `local` when it is not set. Node
counts are fixed when a Flyte task is built, so the same variable is handed on to the pods.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from flytekit import PodTemplate, Resources
from flytekitplugins.kfpytorch import Elastic
from kubernetes.client import (
    V1Container,
    V1EmptyDirVolumeSource,
    V1PodSpec,
    V1ResourceRequirements,
    V1Volume,
    V1VolumeMount,
)
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from controlllm.errors import UserError

PROFILES = Path(__file__).parents[1] / "k8s" / "profiles"


class Profile(BaseModel):
    """One cluster profile; cpu, memory and shared_memory are one node's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    nodes: PositiveInt
    processes_per_node: PositiveInt
    gpus_per_process: int
    cpu: str
    memory: str
    shared_memory: str | None
    image_train: str
    image_serve: str
    env: dict[str, str]

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def gpus(self) -> int:
        return self.processes_per_node * self.gpus_per_process


@cache
def profile() -> Profile:
    """The profile of this process; UserError names the file and what is wrong in it."""
    name = os.environ.get("CONTROLLLM_PROFILE", "local")
    file = Path(name) if name.endswith(".yaml") else PROFILES / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in PROFILES.glob("*.yaml")))
        raise UserError(f"CONTROLLLM_PROFILE: '{name}' is no cluster profile; known: {known}, or the path of a file")
    try:
        return Profile.model_validate(yaml.safe_load(file.read_text()))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def elastic() -> Elastic | None:
    """How Flyte starts the processes of training; None is this one process.

    No restarts inside the job: with them a recoverable error arrives as one that Flyte never retries.
    """
    if profile().processes == 1:
        return None
    return Elastic(
        nnodes=profile().nodes,
        nproc_per_node=profile().processes_per_node,
        start_method="spawn",
        max_restarts=0,
        increase_shared_mem=False,
    )


def environment() -> dict[str, str]:
    """Handed to every pod, so that it builds the same tasks."""
    return {"CONTROLLLM_PROFILE": os.environ.get("CONTROLLLM_PROFILE", "local"), **profile().env}


def light() -> Resources:
    """A stage that needs no accelerator."""
    return Resources(cpu=profile().cpu, mem=profile().memory)


def training_pod() -> PodTemplate | None:
    """The training pod, whole: Flyte would drop what stands in Resources beside a template."""
    if not profile().gpus and not profile().shared_memory:
        return None
    amounts = {"cpu": profile().cpu, "memory": profile().memory}
    if profile().gpus:
        amounts["nvidia.com/gpu"] = str(profile().gpus)
    memory = V1EmptyDirVolumeSource(medium="Memory", size_limit=profile().shared_memory)
    container = V1Container(
        name="primary",
        resources=V1ResourceRequirements(requests=amounts, limits=amounts),
        volume_mounts=[V1VolumeMount(name="shm", mount_path="/dev/shm")],  # noqa: S108 - the pod's shared memory
    )
    return PodTemplate(pod_spec=V1PodSpec(containers=[container], volumes=[V1Volume(name="shm", empty_dir=memory)]))


def image(kind: str) -> Any:
    """A named image, given at registration as `--image train=...`."""
    return profile().image_serve if kind == "serve" else profile().image_train
