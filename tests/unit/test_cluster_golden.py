"""What Flyte is sent under each profile, and what it would make of it on Kubernetes: pods and a PyTorchJob."""

import json

import pytest
from custom_kinds import validate
from serialized import serialized

from controlllm.config.cluster import load_profile, profile_names
from controlllm.config.pods import PODS

PROFILES = profile_names()


def tasks_of(profile: str) -> dict[str, dict]:
    """By the function's name."""
    found = serialized(*PROFILES)[profile]["tasks"]
    return {name.rsplit(".", 1)[1]: template for name, template in found.items()}


def container_of(template: dict) -> dict:
    (container,) = template["k8sPod"]["podSpec"]["containers"]
    return container


def environment_of(template: dict) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container_of(template)["env"] if "value" in variable}


def pod_of(template: dict) -> dict:
    pod = template["k8sPod"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x", **pod.get("metadata", {})},
        "spec": pod["podSpec"],
    }


def job_of(template: dict) -> dict:
    """The PyTorchJob that Flyte makes of the task: its pod is the worker, its container has the operator's name."""
    custom, pod = template["custom"], json.loads(json.dumps(pod_of(template)))
    pod["spec"]["containers"][0]["name"] = "pytorch"
    elastic = custom["elasticConfig"]
    policy = {
        "minReplicas": int(elastic["minReplicas"]),
        "maxReplicas": int(elastic["maxReplicas"]),
        "nProcPerNode": int(elastic["nprocPerNode"]),
        "maxRestarts": int(elastic.get("maxRestarts", 0)),  # protobuf leaves zeros out
        "rdzvBackend": elastic["rdzvBackend"],
    }
    finished = {
        "cleanPodPolicy": custom["runPolicy"]["cleanPodPolicy"].removeprefix("CLEANPOD_POLICY_").capitalize(),
        "ttlSecondsAfterFinished": int(custom["runPolicy"]["ttlSecondsAfterFinished"]),
    }
    worker = {
        "replicas": int(custom["workerReplicas"]["replicas"]),
        "restartPolicy": "Never",
        "template": {"metadata": {"labels": pod["metadata"].get("labels", {})}, "spec": pod["spec"]},
    }
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "x"},
        "spec": {"elasticPolicy": policy, "runPolicy": finished, "pytorchReplicaSpecs": {"Worker": worker}},
    }


@pytest.mark.parametrize("profile", PROFILES)
def test_every_task_has_its_pod(profile):
    assert set(tasks_of(profile)) == set(PODS)


@pytest.mark.parametrize("profile", PROFILES)
def test_tasks_ask_for_what_the_profile_says(profile):
    said = load_profile(profile)
    for name, template in tasks_of(profile).items():
        pod, container, metadata = said.pod(name), container_of(template), template["metadata"]
        amounts = {"cpu": pod.cpu, "memory": pod.memory, **pod.resources}
        if pod.pod_gpus:
            amounts["nvidia.com/gpu"] = str(pod.pod_gpus)
        assert container["resources"] == {"requests": amounts, "limits": amounts}, name
        assert container["image"] == f"registry.example/{pod.image}:1"
        assert metadata["retries"].get("retries", 0) == pod.retries
        assert metadata["timeout"] == f"{int(3600 * (pod.timeout_hours or 0))}s"
        assert metadata.get("interruptible", False) == pod.interruptible
        assert template["k8sPod"]["podSpec"].get("nodeSelector", {}) == pod.node_selector
        assert len(template["k8sPod"]["podSpec"].get("tolerations", [])) == len(pod.tolerations)
        labels = template["k8sPod"]["metadata"].get("labels", {})
        assert labels.get("kueue.x-k8s.io/queue-name") == (pod.queue.name if pod.queue else None)
        shm = [v for v in template["k8sPod"]["podSpec"].get("volumes", []) if v["name"] == "shm"]
        assert [v["emptyDir"]["sizeLimit"] for v in shm] == ([pod.shared_memory] if pod.shared_memory else [])


@pytest.mark.parametrize("profile", PROFILES)
def test_pods_build_the_tasks_that_were_registered(profile):
    said = load_profile(profile)
    for name, template in tasks_of(profile).items():
        environment = environment_of(template)
        assert load_profile(environment["CONTROLLLM_PROFILE"]) == said
        assert said.variables(said.pod(name)).items() <= environment.items()
        assert container_of(template)["args"][-4:-2] == ["task-module", template["id"]["name"].rsplit(".", 1)[0]]


@pytest.mark.parametrize("profile", PROFILES)
def test_pods_are_valid_and_have_no_rights(profile):
    for name, template in tasks_of(profile).items():
        validate(pod_of(template))
        spec, container = template["k8sPod"]["podSpec"], container_of(template)
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["automountServiceAccountToken"]
        rights = container["securityContext"]
        assert not rights["allowPrivilegeEscalation"]
        assert rights["capabilities"]["drop"] == ["ALL"]
        assert rights["capabilities"].get("add", []) == load_profile(profile).pod(name).capabilities
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in spec.get("volumes", [])}


@pytest.mark.parametrize("profile", PROFILES)
def test_secrets_are_named_and_never_said(profile):
    said = load_profile(profile)
    for template in tasks_of(profile).values():
        referred = {
            v["name"]: v["valueFrom"]["secretKeyRef"] for v in container_of(template)["env"] if "valueFrom" in v
        }
        assert referred == {name: {"name": key.secret, "key": key.key} for name, key in said.secrets.items()}
        assert not set(environment_of(template)) & set(said.secrets)


@pytest.mark.parametrize("profile", PROFILES)
def test_one_node_is_a_plain_pod_and_several_are_a_job(profile):
    template, said = tasks_of(profile)["train"], load_profile(profile)
    if said.train.nodes == 1:
        assert template["type"] == "python-task"
        assert "workerReplicas" not in template.get("custom", {})
        return
    assert template["type"] == "pytorch"
    assert "masterReplicas" not in template["custom"]
    job = job_of(template)
    validate(job)
    assert job["spec"]["elasticPolicy"] == {
        "minReplicas": 2, "maxReplicas": 2, "nProcPerNode": 8, "maxRestarts": 0, "rdzvBackend": "c10d",
    }  # fmt: skip
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2
    assert job["spec"]["runPolicy"] == {"cleanPodPolicy": "Running", "ttlSecondsAfterFinished": 86400}


def test_a_field_that_the_operator_does_not_know_is_found():
    job = job_of(tasks_of("multi-node")["train"])
    job["spec"]["elasticPolicy"]["nodes"] = 2
    with pytest.raises(Exception, match="'nodes' was unexpected"):
        validate(job)
    del job["spec"]["elasticPolicy"]["nodes"]
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["hostname_"] = "x"
    with pytest.raises(Exception, match="hostname_"):
        validate(job)


CACHED = ["ingest", "plan_pieces", "prepare_piece", "prepare", "train", "consolidate", "dial", "probe", "smoke"]
CACHED += ["plan_benchmark", "benchmark_task", "benchmark"]


def test_what_only_delivers_or_checks_is_never_cached():
    tasks = tasks_of("multi-node")
    cached = {name for name, template in tasks.items() if template["metadata"].get("discoverable")}
    assert set(CACHED) <= cached
    assert not cached & {"preflight", "report", "promote"}
    versions = {name: tasks[name]["metadata"]["discoveryVersion"] for name in cached}
    assert versions["train"] not in {version for name, version in versions.items() if name != "train"}


@pytest.mark.slow
def test_pieces_and_benchmarks_fan_out():
    found = serialized("multi-node", workflows=True)["multi-node"]
    maps = {name: template for name, template in found["tasks"].items() if "arraynode" in name}
    for part in ("map_prepare_piece_", "map_benchmark_task_"):
        (template,) = [template for name, template in maps.items() if part in name]
        assert container_of(template)["args"][0] == "pyflyte-map-execute"
        validate(pod_of(template))
    assert any("plan_benchmark" in task for task in found["workflows"]["workflows.finetune.measured"])
