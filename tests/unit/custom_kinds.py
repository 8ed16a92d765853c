"""Strict schemas of the kinds that Kubernetes itself does not know: the fields that this project may use.

After the custom resource definitions of the training operator 1.9 and Kueue 0.14; a field that is not here is an error.
"""

from typing import Any

import jsonschema
import kubernetes_validate

KUBERNETES = "1.37"
TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
LABELS = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?([kMGTP]i?|m)?$"}


def section(required: str = "", **properties: Any) -> dict[str, Any]:
    """An object with these keys and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def array(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


def kind(api: str, name: str, *, required: str, **sections: Any) -> dict[str, Any]:
    metadata = section("name", name=TEXT, namespace=TEXT, labels=LABELS, annotations=LABELS)
    heads = {"apiVersion": {"const": api}, "kind": {"const": name}, "metadata": metadata}
    return section(f"apiVersion kind metadata {required}", **heads, **sections)


_REPLICAS = section(
    "replicas template",
    replicas={"type": "integer", "minimum": 1},
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template=section("spec", metadata=section(labels=LABELS, annotations=LABELS), spec={"type": "object"}),
)
_ELASTIC = section(
    "",
    minReplicas=COUNT,
    maxReplicas=COUNT,
    maxRestarts=COUNT,
    nProcPerNode=COUNT,
    rdzvBackend={"enum": ["c10d", "etcd", "etcd-v2"]},
    rdzvHost=TEXT,
    rdzvPort=COUNT,
    rdzvId=TEXT,
    rdzvConf=array(section("key value", key=TEXT, value=TEXT)),
    standalone=FLAG,
)
_POLICY = section(
    "",
    cleanPodPolicy={"enum": ["All", "Running", "None"]},
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    suspend=FLAG,
)
_FLAVOR = section(
    "name resources",
    name=TEXT,
    resources=array(
        section("name nominalQuota", name=TEXT, nominalQuota=QUANTITY, borrowingLimit=QUANTITY, lendingLimit=QUANTITY)
    ),
)
KUEUE = "kueue.x-k8s.io/v1beta1"
SCHEMAS = {
    "PyTorchJob": kind(
        "kubeflow.org/v1",
        "PyTorchJob",
        required="spec",
        spec=section(
            "pytorchReplicaSpecs",
            elasticPolicy=_ELASTIC,
            runPolicy=_POLICY,
            nprocPerNode=TEXT,
            pytorchReplicaSpecs=section("Worker", Master=_REPLICAS, Worker=_REPLICAS),
        ),
    ),
    "ResourceFlavor": kind(
        KUEUE,
        "ResourceFlavor",
        required="",
        spec=section(
            "", nodeLabels=LABELS, nodeTaints=array({"type": "object"}), tolerations=array({"type": "object"})
        ),
    ),
    "ClusterQueue": kind(
        KUEUE,
        "ClusterQueue",
        required="spec",
        spec=section(
            "resourceGroups",
            cohort=TEXT,
            namespaceSelector=section("", matchLabels=LABELS),
            queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
            preemption=section(
                "",
                withinClusterQueue={"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]},
                reclaimWithinCohort={"enum": ["Never", "LowerPriority", "Any"]},
            ),
            resourceGroups=array(
                section("coveredResources flavors", coveredResources=array(TEXT), flavors=array(_FLAVOR))
            ),
        ),
    ),
    "LocalQueue": kind(KUEUE, "LocalQueue", required="spec", spec=section("clusterQueue", clusterQueue=TEXT)),
    "WorkloadPriorityClass": kind(
        KUEUE, "WorkloadPriorityClass", required="value", value={"type": "integer"}, description=TEXT
    ),
}


def validate(manifest: dict[str, Any]) -> None:
    """Strictly; what runs pods by what Kubernetes says of pods, too."""
    schema = SCHEMAS.get(manifest["kind"])
    if schema is None:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    jsonschema.validate(manifest, schema)
    if manifest["kind"] == "PyTorchJob":
        for replicas in manifest["spec"]["pytorchReplicaSpecs"].values():
            validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "of-the-job"}, **replicas["template"]})
