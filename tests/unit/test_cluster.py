"""Cluster profiles: what Flyte would be asked for, and mistakes in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from controlllm.errors import UserError
from tasks import cluster

ROOT = Path(__file__).parents[2]
# Tasks are built when they are imported, so each profile needs a process of its own.
PROGRAM = """
import json
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from google.protobuf.json_format import MessageToDict
from tasks.train import train
image = Image(name="train", fqn="registry/train", tag="1")
images = ImageConfig(default_image=image, images=[image, Image(name="serve", fqn="registry/serve", tag="1")])
settings = SerializationSettings(image_config=images)
pod, container = train.get_k8s_pod(settings), train.get_container(settings)
print(json.dumps({
    "type": train.task_type,
    "custom": train.get_custom(settings) if train.task_config else None,
    "pod": pod.pod_spec if pod else None,
    "image": container.image if container else None,
    "cached": train.metadata.cache,
    "environment": train.environment,
}))
"""


def training(profile: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "CONTROLLLM_PROFILE": profile, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_one_process_is_a_plain_task():
    task = training("local")
    assert task["type"] == "python-task"
    assert task["image"] == "registry/train:1"
    assert task["cached"]
    assert task["environment"]["CONTROLLLM_PROFILE"] == "local"


def test_two_nodes_of_eight_gpus():
    task = training("gpu-8x2")
    assert task["type"] == "pytorch"
    assert task["custom"]["workerReplicas"]["replicas"] == 2
    assert task["custom"]["elasticConfig"]["nprocPerNode"] == 8
    assert task["custom"]["elasticConfig"].get("maxRestarts", 0) == 0  # protobuf leaves zeros out
    assert "masterReplicas" not in task["custom"]
    container = task["pod"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert container["volumeMounts"][0]["mountPath"] == "/dev/shm"
    assert task["environment"]["CONTROLLLM_PROFILE"] == "gpu-8x2"


def test_unknown_profile_names_the_known(monkeypatch):
    monkeypatch.setenv("CONTROLLLM_PROFILE", "gpu")
    cluster.profile.cache_clear()
    with pytest.raises(UserError, match="'gpu' is no cluster profile; known: gpu-8x2, local, two-processes"):
        cluster.profile()
    cluster.profile.cache_clear()


def test_mistake_in_a_profile_is_named(monkeypatch, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text((cluster.PROFILES / "local.yaml").read_text() + "nodez: 2\n")
    monkeypatch.setenv("CONTROLLLM_PROFILE", str(file))
    cluster.profile.cache_clear()
    with pytest.raises(UserError, match=r"mine\.yaml: nodez: Extra inputs"):
        cluster.profile()
    cluster.profile.cache_clear()
