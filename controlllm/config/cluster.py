"""Where a run happens: a cluster profile, which says what each of a run's pods asks for. The recipe says what is run.

`CONTROLLLM_PROFILE` names a file of `k8s/profiles`, or is the path of one, or (in pods) is the profile itself as JSON;
`local` when it is not set. Loads neither torch nor flytekit.
"""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from controlllm.config.base import Config, Name
from controlllm.config.launch import Launch
from controlllm.config.pods import PODS, Label, Pod, SecretKey, ServePod, TrainPod, Volume, refuse_secrets
from controlllm.errors import UserError
from controlllm.fingerprint import PACKAGE
from controlllm.mistakes import explain
from controlllm.recipe import Source, read

PROFILES = PACKAGE.parent / "k8s" / "profiles"
VARIABLE = "CONTROLLLM_PROFILE"


class Profile(Config):
    """One cluster, seen from a run."""

    name: Name
    """The file's."""
    cache: str | None = None
    """Where pods keep what stages made; each its own disk when left out."""
    checkpoints: str | None = None
    """Under this folder or URI each training run has a folder of its own, named by what it depends on, which every
    try finds again; in `cache` when left out."""
    service_account: Label | None = None
    """Of the pods; the namespace's default when left out."""
    volumes: list[Volume] = []
    """Files that all pods see."""
    secrets: dict[str, SecretKey] = {}
    """Environment variables whose values stand in Secrets."""
    env: dict[str, str] = {}
    """Of all pods."""
    light: Pod
    """Checks, plans, the report."""
    data: Pod
    """Ingest, prepare, consolidate: CPU, memory and disk."""
    train: TrainPod
    """Each node of the training job."""
    serve: ServePod
    """Benchmark, dial, probe, smoke test."""
    launch: Launch = Launch()
    """Of the launch plans."""

    @property
    def processes(self) -> int:
        """Of a training run."""
        return self.train.nodes * self.train.processes_per_node

    def pod(self, task: str) -> Pod:
        """Where a task runs."""
        return getattr(self, PODS[task])

    def variables(self, pod: Pod) -> dict[str, str]:
        """The environment of a pod, without what stands in Secrets."""
        places = {"CONTROLLLM_CACHE": self.cache, "CONTROLLLM_CHECKPOINTS": self.checkpoints}
        return {name: place for name, place in places.items() if place} | self.env | pod.env

    @model_validator(mode="after")
    def _places_are_shared(self) -> "Profile":
        refuse_secrets(self.env)
        for key in ("cache", "checkpoints"):
            place = getattr(self, key)
            if place and "://" not in place and not any(_inside(place, volume.mount) for volume in self.volumes):
                raise ValueError(f"{key} '{place}' lies on none of volumes, so that it would end with its pod")
        if self.cache is None and (self.train.nodes > 1 or self.train.interruptible):
            why = f"train.nodes is {self.train.nodes}" if self.train.nodes > 1 else "train.interruptible is true"
            raise ValueError(f"cache must be a folder of a volume that all nodes see, since {why}; found none")
        return self


def load_profile(name: str | None = None) -> Profile:
    """By name, path or JSON; of CONTROLLLM_PROFILE when left out. UserError names file, line, key and nearest key."""
    name = name or os.environ.get(VARIABLE) or "local"
    if name.startswith("{"):
        return _validated(_parsed(name), Source(VARIABLE))
    file = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not file.is_file():
        raise UserError(
            f"{VARIABLE}: '{name}' is no cluster profile; known: {', '.join(profile_names())}, or the path of a file"
        )
    tree, source = read(file)
    if "name" in tree:
        raise UserError(f"{source.locate(('name',))}unknown key 'name': a profile is named by its file")
    return _validated({"name": file.stem} | tree, source)


def profile_names() -> list[str]:
    """Those of k8s/profiles."""
    return sorted(file.stem for file in PROFILES.glob("*.yaml"))


def chosen_profile() -> Profile | None:
    """That of CONTROLLLM_PROFILE, if it is set: then it must fit what is there."""
    return load_profile() if os.environ.get(VARIABLE) else None


def check_processes(size: int) -> None:
    """UserError where a launcher started another number of processes than the profile says."""
    profile = chosen_profile()
    if profile is not None and profile.processes != size:
        pod = profile.train
        raise UserError(
            f"profile {profile.name}: {pod.nodes} nodes × {pod.processes_per_node} processes need WORLD_SIZE "
            f"{profile.processes}, but WORLD_SIZE is {size}; start as many, or choose another {VARIABLE}"
        )


def _validated(tree: Any, source: Source) -> Profile:
    try:
        return Profile.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, Profile, tree=tree, source=source)) from None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{VARIABLE}: begins as JSON and is none ({error}); give a name or the path of a file"
        ) from None


def _inside(place: str, mount: str) -> bool:
    return Path(place).is_relative_to(mount)
