"""The cluster's files, whole for each profile: valid, no more rights than needed, and what the profile counts on."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from custom_kinds import validate

from controlllm.config.cluster import load_profile, profile_names
from controlllm.config.pods import PODS

ROOT = Path(__file__).parents[2]
KUBECTL = Path(sys.executable).with_name("kubectl")
PROFILES = profile_names()
NAMESPACE = "controlllm-development"
CLUSTER_WIDE = {"Namespace", "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass"}
UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@cache
def built(profile: str) -> list[dict]:
    folder = ROOT / "k8s" / "overlays" / profile
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(profile: str, kind: str) -> dict[str, dict]:
    return {m["metadata"]["name"]: m for m in built(profile) if m["kind"] == kind}


def amount(quantity: str) -> float:
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", quantity)
    assert match
    return float(match[1]) * UNITS[match[2]]


def test_every_profile_has_an_overlay():
    assert sorted(folder.name for folder in (ROOT / "k8s" / "overlays").iterdir()) == PROFILES


@pytest.mark.parametrize("profile", PROFILES)
def test_manifests_are_valid(profile):
    for manifest in built(profile):
        validate(manifest)
        where = manifest["metadata"].get("namespace")
        assert where == (None if manifest["kind"] in CLUSTER_WIDE else NAMESPACE), manifest["metadata"]["name"]
    names = [(m["kind"], m["metadata"]["name"]) for m in built(profile)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_finds_what_it_counts_on(profile):
    said = load_profile(profile)
    claims, maps = of_kind(profile, "PersistentVolumeClaim"), of_kind(profile, "ConfigMap")
    for volume in said.volumes:
        assert volume.claim is None or claims[volume.claim]["spec"]["accessModes"] == ["ReadWriteMany"]
        assert volume.config_map is None or volume.config_map in maps
    assert said.service_account is None or said.service_account in of_kind(profile, "ServiceAccount")
    for task in PODS:
        if queue := said.pod(task).queue:
            assert queue.name in of_kind(profile, "LocalQueue")
            assert queue.priority in of_kind(profile, "WorkloadPriorityClass")
        if said.pod(task).capabilities:
            (namespace,) = of_kind(profile, "Namespace").values()
            assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"


@pytest.mark.parametrize("profile", [name for name in PROFILES if load_profile(name).train.queue])
def test_the_queue_has_room_for_a_whole_training(profile):
    said = load_profile(profile)
    (queue,) = of_kind(profile, "ClusterQueue").values()
    (group,) = queue["spec"]["resourceGroups"]
    quotas = {}
    for flavor in group["flavors"]:
        quotas[flavor["name"]] = {r["name"]: amount(r["nominalQuota"]) for r in flavor["resources"]}
        assert set(quotas[flavor["name"]]) == set(group["coveredResources"])
    cpu, gpu = quotas["controlllm-cpu"], quotas["controlllm-gpu"]
    assert cpu["nvidia.com/gpu"] == 0
    assert next(iter(quotas)) == "controlllm-cpu", "tried first: what needs no GPU stays off the GPU nodes"
    pods = [(said.train, said.train.nodes, gpu), (said.serve, 1, gpu), (said.light, 1, cpu), (said.data, 1, cpu)]
    for pod, nodes, quota in pods:
        asked = {"cpu": pod.cpu, "memory": pod.memory, "nvidia.com/gpu": str(pod.pod_gpus), **pod.resources}
        for name, quantity in asked.items():
            assert nodes * amount(quantity) <= quota[name], name
    labels = of_kind(profile, "ResourceFlavor")["controlllm-gpu"]["spec"]["nodeLabels"]
    assert said.train.node_selector == labels
    (local,) = of_kind(profile, "LocalQueue").values()
    assert local["spec"]["clusterQueue"] in of_kind(profile, "ClusterQueue")


@pytest.mark.parametrize("profile", PROFILES)
def test_nobody_has_more_rights_than_it_needs(profile):
    """Flyte's account handles PyTorchJobs in one namespace; the pods' own has no role and no token."""
    (role,) = of_kind(profile, "Role").values()
    (rule,) = role["rules"]
    assert rule == {
        "apiGroups": ["kubeflow.org"],
        "resources": ["pytorchjobs"],
        "verbs": ["get", "list", "watch", "create", "update", "patch", "delete"],
    }
    (binding,) = of_kind(profile, "RoleBinding").values()
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [(s["name"], s["namespace"]) for s in binding["subjects"]] == [("flyte-binary", "flyte")]
    assert not {"ClusterRole", "ClusterRoleBinding"} & {m["kind"] for m in built(profile)}
    assert not any(account["automountServiceAccountToken"] for account in of_kind(profile, "ServiceAccount").values())


@pytest.mark.parametrize("profile", PROFILES)
def test_pods_reach_nothing_but_what_is_named(profile):
    policies = of_kind(profile, "NetworkPolicy")
    assert policies["nothing"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    everyone = {name for name, policy in policies.items() if policy["spec"]["podSelector"] == {}}
    assert everyone - {"storage"} == {"nothing", "names", "buckets-and-hub"}
    (outside,) = policies["buckets-and-hub"]["spec"]["egress"]
    assert outside["ports"] == [{"protocol": "TCP", "port": 443}]
    assert outside["to"][0]["ipBlock"]["except"] == ["169.254.169.254/32"]
    within = policies["within-training"]["spec"]
    assert within["ingress"][0]["from"] == [{"podSelector": within["podSelector"]}] == within["egress"][0]["to"]


def secrets_in(tree: object) -> list[str]:
    """Keys of an environment or of text that hold a value where a reference should stand."""
    found = []
    if isinstance(tree, dict):
        name = str(tree.get("name", ""))
        if re.search(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY", name) and tree.get("value"):
            found.append(name)
        for key, value in tree.items():
            secret = re.search(r"(?i)(password|secretKey|token|accessKey)$", str(key))
            if secret and isinstance(value, str) and value:
                found.append(str(key))
            found += secrets_in(value)
    elif isinstance(tree, list):
        found = [name for item in tree for name in secrets_in(item)]
    return found


def test_no_file_holds_a_secret():
    files = sorted((ROOT / "k8s").rglob("*.yaml"))
    assert len(files) > 20
    for file in files:
        for manifest in yaml.safe_load_all(file.read_text()):
            assert manifest is None or manifest.get("kind") != "Secret", file
            assert secrets_in(manifest) == [], file
    assert secrets_in({"env": [{"name": "HF_TOKEN", "value": "x"}], "password": "y"}) == ["HF_TOKEN", "password"]


def test_tensorboard_reads_the_cache_and_writes_nothing():
    manifest = of_kind("one-node-8", "Deployment")["tensorboard"]
    spec = manifest["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["image"].startswith("registry.example/controlllm-cpu:")
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")] == ["/tmp"]
    (service,) = [s for s in of_kind("one-node-8", "Service").values() if s["metadata"]["name"] == "tensorboard"]
    assert service["spec"]["selector"].items() <= manifest["spec"]["template"]["metadata"]["labels"].items()


# Values of the charts


def values(name: str) -> dict:
    return yaml.safe_load((ROOT / "k8s" / "values" / f"{name}.yaml").read_text())


def test_flyte_lowers_no_pod():
    """What a task asks for above these limits Flyte cuts off."""
    flyte = values("flyte-binary")
    limits = flyte["configuration"]["inline"]["task_resources"]["limits"]
    for profile in map(load_profile, PROFILES):
        for task in PODS:
            pod = profile.pod(task)
            assert amount(pod.cpu) <= amount(limits["cpu"])
            assert amount(pod.memory) <= amount(limits["memory"])
            assert pod.pod_gpus <= int(limits["gpu"])
    plugins = flyte["enabled_plugins"]["tasks"]["task-plugins"]
    assert set(plugins["default-for-task-types"].values()) <= set(plugins["enabled-plugins"])
    assert "pytorch" in plugins["enabled-plugins"]
    template = flyte["configuration"]["inline"]["plugins"]["k8s"]["default-pod-template-name"]
    assert template in of_kind("local", "PodTemplate")


def test_flyte_tries_spot_as_often_as_its_profile():
    node = values("flyte-binary")["configuration"]["inline"]["propeller"]["node-config"]
    assert node["max-node-retries-system-failures"] >= load_profile("spot").train.retries
    k8s = values("flyte-binary")["configuration"]["inline"]["plugins"]["k8s"]
    (toleration,) = k8s["interruptible-tolerations"]
    assert toleration["key"] in [t.key for t in load_profile("spot").train.tolerations]


def test_kueue_manages_what_is_queued():
    text = values("kueue")["managerConfig"]["controllerManagerConfigYaml"]
    kueue = yaml.safe_load(text)
    assert kueue["kind"] == "Configuration"
    assert kueue["integrations"]["frameworks"] == ["pod", "kubeflow.org/pytorchjob"]
    assert kueue["managedJobsNamespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": NAMESPACE}


def test_the_training_operator_is_patched_where_it_is(tmp_path):
    """Against a Deployment of its names, since the operator's own manifests are on another machine."""
    patched = ROOT / "k8s" / "values" / "training-operator"
    kustomization = yaml.safe_load((patched / "kustomization.yaml").read_text())
    assert kustomization["resources"][0].endswith("?ref=v1.9.3")
    container = {"name": "training-operator", "image": "operator:1", "command": ["/manager"]}
    labels = {"control-plane": "kubeflow-training-operator"}
    operator = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "training-operator", "namespace": "kubeflow"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }
    (tmp_path / "operator.yaml").write_text(json.dumps(operator))
    (tmp_path / "only-pytorch.yaml").write_text((patched / "only-pytorch.yaml").read_text())
    kustomization["resources"] = ["operator.yaml"]
    (tmp_path / "kustomization.yaml").write_text(json.dumps(kustomization))
    done = subprocess.run([KUBECTL, "kustomize", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = yaml.safe_load(done.stdout)
    validate(made)
    assert made["spec"]["template"]["spec"]["containers"][0]["args"] == ["--enable-scheme=pytorchjob"]
