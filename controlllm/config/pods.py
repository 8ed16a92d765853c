"""What one pod of a run asks for: the parts of a cluster profile."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from controlllm.config.base import Config, Count, Number, Positive

PodKind = Literal["light", "data", "train", "serve"]
PODS: dict[str, PodKind] = {
    "preflight": "light",
    "for_tick": "light",
    "plan_pieces": "light",
    "plan_benchmark": "light",
    "report": "light",
    "assessment": "light",
    "ingest": "data",
    "fetch": "data",
    "prepare_piece": "data",
    "prepare": "data",
    "consolidate": "data",
    "promote": "data",
    "train": "train",
    "benchmark_task": "serve",
    "benchmark": "serve",
    "dial": "serve",
    "probe": "serve",
    "smoke": "serve",
}
"""Every task, and the pod it runs in."""

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")]
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
MountPath = Annotated[str, Field(pattern=r"^/[^:]+$")]
_SECRET = re.compile(r"SECRET|PASSWORD|CREDENTIAL|(^|_)(TOKEN|KEY|PASS)(_|$)")


class Nfs(Config):
    """A folder of an NFS server."""

    server: str
    """Its name or address."""
    path: MountPath
    """As the server exports it."""


class Volume(Config):
    """Files that every pod sees at `mount`: one of claim, nfs and config_map says whose."""

    name: Label
    """Of the volume within the pod."""
    mount: MountPath
    """Where the pod sees it."""
    read_only: bool = False
    """Whether pods may only read it."""
    claim: Label | None = None
    """A PersistentVolumeClaim of the namespace."""
    nfs: Nfs | None = None
    """A folder of an NFS server."""
    config_map: Label | None = None
    """A ConfigMap, such as a Hadoop cluster's core-site.xml and hdfs-site.xml."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Volume":
        given = [name for name in ("claim", "nfs", "config_map") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"name {self.name} needs one of claim, nfs and config_map, found {len(given)}")
        return self


class SecretKey(Config):
    """A key of a Secret of the namespace."""

    secret: Label
    """The Secret's name."""
    key: str
    """The key within it."""


class Toleration(Config):
    """A taint of nodes that pods accept, as Kubernetes writes it."""

    key: str | None = None
    """The taint's key; every one when left out."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Whether the taint has to be there, or to have `value`, too."""
    value: str | None = None
    """What the taint must be, where `operator` is Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """The taint's effect; every one when left out."""


class Queue(Config):
    """Kueue's labels."""

    name: Label
    """A LocalQueue of the namespace."""
    priority: Label | None = None
    """A WorkloadPriorityClass."""


class Pod(Config):
    """What one pod asks for; cpu and memory are both requested and the limit."""

    image: Annotated[str, Field(pattern=r"^[A-Za-z0-9][^\s{}]*$")]
    """A name that registration is told (`--image train=...`), or a whole reference (with a slash or a colon)."""
    cpu: Quantity
    """Cores."""
    memory: Quantity
    """Bytes, such as 16Gi."""
    shared_memory: Quantity | None = None
    """Of /dev/shm, through which processes talk; 64 MiB when left out."""
    resources: dict[str, Quantity] = {}
    """Whatever else nodes offer, such as {rdma/ib: "1"}."""
    capabilities: list[str] = []
    """Of Linux, such as IPC_LOCK for RDMA; none otherwise."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes, such as the kind of GPU."""
    tolerations: list[Toleration] = []
    """Taints of nodes that the pod accepts."""
    env: dict[str, str] = {}
    """Environment variables; what is secret stands under secrets."""
    queue: Queue | None = None
    """Where Kueue lets the pod wait; none when left out."""
    retries: Count = 0
    """Tries after the first, of failures that another try may cure."""
    timeout_hours: Annotated[Number, Field(gt=0)] | None = None
    """Of one try."""
    interruptible: bool = False
    """Spot machines: what they take away is tried again, and does not count as a try."""

    @property
    def pod_gpus(self) -> int:
        """Of one pod."""
        return 0

    @property
    def image_name(self) -> str | None:
        """What `--image` has to name; None for a whole reference."""
        return None if "/" in self.image or ":" in self.image else self.image

    @model_validator(mode="after")
    def _no_secret(self) -> "Pod":
        refuse_secrets(self.env)
        return self


class ServePod(Pod):
    """A pod that runs models: benchmark, dial, probe, smoke test."""

    gpus: Count = 0
    """Of one pod."""

    @property
    def pod_gpus(self) -> int:
        return self.gpus


class TrainPod(Pod):
    """One node of the training job. Nothing else says how many processes there are."""

    nodes: Positive
    """Pods of the job."""
    processes_per_node: Positive
    """Of one pod."""
    gpus_per_process: Annotated[Count, Field(le=1)]
    """1, or 0 for a job on CPUs."""
    rendezvous_minutes: Positive = 15
    """How long the first nodes wait for the last."""

    @property
    def pod_gpus(self) -> int:
        return self.processes_per_node * self.gpus_per_process


def refuse_secrets(env: dict[str, str]) -> None:
    """ValueError for a variable that by its name holds a secret."""
    for name in env:
        if _SECRET.search(name):
            raise ValueError(f"env.{name} holds a secret: name the Secret that holds it under secrets instead")
