"""k8s/serve: valid, no more rights than needed, and whole together with what the cluster has."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import typer
import yaml
from custom_kinds import validate

from controlllm.cli import app

ROOT = Path(__file__).parents[2]
KUBECTL = Path(sys.executable).with_name("kubectl")
NAMESPACE = "controlllm-development"


@cache
def built(folder: Path = ROOT / "k8s/serve") -> dict[str, dict[str, Any]]:
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout)}


def _pod() -> dict[str, Any]:
    return built()["Deployment"]["spec"]["template"]["spec"]


def test_manifests_are_valid_and_in_the_namespace():
    assert set(built()) == {"Deployment", "Service", "NetworkPolicy", "ConfigMap"}
    for manifest in built().values():
        validate(manifest)
        assert manifest["metadata"]["namespace"] == NAMESPACE


def test_the_service_and_the_policy_reach_the_pods():
    labels = built()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    service, policy = built()["Service"]["spec"], built()["NetworkPolicy"]["spec"]
    for selector in (service["selector"], policy["podSelector"]["matchLabels"]):
        assert selector.items() <= labels.items()
    (container,) = _pod()["containers"]
    (port,) = container["ports"]
    assert service["ports"][0]["targetPort"] == port["name"]
    assert policy["ingress"][0]["ports"][0]["port"] == port["containerPort"]
    assert f"--port={port['containerPort']}" in container["args"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}


def test_no_root_no_rights_and_nothing_written_but_to_its_own_folders():
    pod = _pod()
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for mount in container["volumeMounts"]:
        assert mount.get("readOnly") or volumes[mount["name"]]["emptyDir"]["sizeLimit"]
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_it_gets_its_model_its_gpus_and_no_secret_inline():
    (container,) = _pod()["containers"]
    said = built()["ConfigMap"]["data"]
    assert container["envFrom"] == [{"configMapRef": {"name": built()["ConfigMap"]["metadata"]["name"]}}]
    asked = set(re.findall(r"\$\((\w+)\)", " ".join(container["args"])))
    assert asked == set(said)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == said["TENSOR_PARALLEL"]
    assert said["MODEL"].startswith(container["volumeMounts"][0]["mountPath"] + "/")
    (key,) = [one for one in container["env"] if "KEY" in one["name"]]
    assert "value" not in key
    claims = yaml.safe_load((ROOT / "k8s/parts/cache/pvc.yaml").read_text())
    assert _pod()["volumes"][0]["persistentVolumeClaim"]["claimName"] == claims["metadata"]["name"]


def test_the_command_knows_its_options():
    (container,) = _pod()["containers"]
    group: Any = typer.main.get_command(app)
    options = {option for parameter in group.commands[container["command"][1]].params for option in parameter.opts}
    assert {argument.partition("=")[0] for argument in container["args"][1:]} <= options


def test_the_overlay_in_the_docs_builds(tmp_path: Path):
    (text,) = re.findall(r"```yaml\n(# mine/kustomization.yaml.*?)```", (ROOT / "docs/serving.md").read_text(), re.S)
    serve = tmp_path / "k8s/serve"
    serve.mkdir(parents=True)
    for file in (ROOT / "k8s/serve").iterdir():
        (serve / file.name).write_text(file.read_text())
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(text)
    made = built(mine)
    (container,) = made["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.mine.example/serve:3"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == made["ConfigMap"]["data"]["TENSOR_PARALLEL"] == "4"
    assert made["ConfigMap"]["data"]["MODEL"] == "/cache/served/mine"
