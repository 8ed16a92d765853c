"""Where a run happens: the cluster profile as what Flyte's `@task` is told, read when the tasks are built.

Counts of nodes and processes are fixed when a Flyte task is built, so the profile is handed on to the pods, whole:
they build what was registered, whatever profiles their image holds.
"""

from datetime import timedelta
from functools import cache
from typing import Any

from flytekit import PodTemplate
from flytekitplugins.kfpytorch import CleanPodPolicy, RunPolicy
from kubernetes.client import (
    V1Capabilities,
    V1ConfigMapVolumeSource,
    V1Container,
    V1EmptyDirVolumeSource,
    V1EnvVar,
    V1EnvVarSource,
    V1NFSVolumeSource,
    V1PersistentVolumeClaimVolumeSource,
    V1PodSecurityContext,
    V1PodSpec,
    V1ResourceRequirements,
    V1SeccompProfile,
    V1SecretKeySelector,
    V1SecurityContext,
    V1Toleration,
    V1Volume,
    V1VolumeMount,
)

from controlllm.config.cluster import VARIABLE, Profile, load_profile
from controlllm.config.pods import Pod, Queue, Volume
from tasks.elastic import Processes

USER = 1000
"""That of the images."""
DAY_SECONDS = 86400
GRACE_SECONDS = 120
"""Between SIGTERM and the end of a pod: time for a checkpoint."""
SHM = "/dev/shm"  # noqa: S108 - the pod's shared memory


@cache
def profile() -> Profile:
    """The profile of this process; UserError names the file and what is wrong in it."""
    return load_profile()


def runs(task: str) -> dict[str, Any]:
    """What `@task` is told of where a task runs, and how often and how long it is tried."""
    pod = profile().pod(task)
    return {
        "container_image": image(pod),
        "pod_template": template(pod),
        "environment": {VARIABLE: _handed_on(), **profile().variables(pod)},
        "retries": pod.retries,
        "timeout": timedelta(hours=pod.timeout_hours) if pod.timeout_hours else 0,
        "interruptible": pod.interruptible,
    }


def processes() -> Processes | None:
    """How Flyte starts the processes of training; None is this one process.

    One node is a plain pod, several are a PyTorchJob. No restarts inside the job: with them an error that another try
    may cure arrives as one that Flyte never retries.
    """
    if profile().processes == 1:
        return None
    seconds = 60 * profile().train.rendezvous_minutes
    return Processes(
        nnodes=profile().train.nodes,
        nproc_per_node=profile().train.processes_per_node,
        start_method="spawn",
        max_restarts=0,
        increase_shared_mem=False,
        # When one node has failed the others hold their GPUs for nothing; logs of those that ended are left for a day.
        run_policy=RunPolicy(clean_pod_policy=CleanPodPolicy.RUNNING, ttl_seconds_after_finished=DAY_SECONDS),
        rdzv_configs={"timeout": seconds, "join_timeout": seconds, "read_timeout": seconds},
    )


def image(pod: Pod) -> str:
    """A whole reference, or what `--image NAME=...` gives at registration."""
    name = pod.image_name
    return pod.image if name is None else f"{{{{.image.{name}.fqn}}}}:{{{{.image.{name}.version}}}}"


def template(pod: Pod) -> PodTemplate:
    """The pod, whole: Flyte would drop some of what stands in a task's Resources beside a template."""
    spec = V1PodSpec(
        containers=[_container(pod)],
        volumes=[*map(_volume, profile().volumes), *([_shared_memory(pod)] if pod.shared_memory else [])] or None,
        node_selector=pod.node_selector or None,
        tolerations=[V1Toleration(**toleration.model_dump()) for toleration in pod.tolerations] or None,
        service_account_name=profile().service_account,
        automount_service_account_token=False,  # a task asks Kubernetes nothing
        termination_grace_period_seconds=GRACE_SECONDS,
        security_context=V1PodSecurityContext(
            run_as_non_root=True,
            run_as_user=USER,
            fs_group=USER,
            fs_group_change_policy="OnRootMismatch",  # else every start walks through the whole cache
            seccomp_profile=V1SeccompProfile(type="RuntimeDefault"),
        ),
    )
    return PodTemplate(pod_spec=spec, labels=queue_labels(pod.queue))


def queue_labels(queue: Queue | None) -> dict[str, str]:
    """Kueue's; a PyTorchJob takes them from the execution, whose launch plan has to carry them."""
    if queue is None:
        return {}
    named = {"kueue.x-k8s.io/queue-name": queue.name}
    return named | ({"kueue.x-k8s.io/priority-class": queue.priority} if queue.priority else {})


def _handed_on() -> str:
    return profile().model_dump_json(exclude_defaults=True)


def _container(pod: Pod) -> V1Container:
    amounts = {"cpu": pod.cpu, "memory": pod.memory, **pod.resources}
    if pod.pod_gpus:
        amounts["nvidia.com/gpu"] = str(pod.pod_gpus)
    mounts = [V1VolumeMount(name=v.name, mount_path=v.mount, read_only=v.read_only) for v in profile().volumes]
    if pod.shared_memory:
        mounts.append(V1VolumeMount(name="shm", mount_path=SHM))
    return V1Container(
        name="primary",
        resources=V1ResourceRequirements(requests=dict(amounts), limits=dict(amounts)),
        volume_mounts=mounts or None,
        env=[_secret(name, key.secret, key.key) for name, key in profile().secrets.items()] or None,
        security_context=V1SecurityContext(
            allow_privilege_escalation=False,
            capabilities=V1Capabilities(drop=["ALL"], add=pod.capabilities or None),
        ),
    )


def _secret(name: str, secret: str, key: str) -> V1EnvVar:
    return V1EnvVar(name=name, value_from=V1EnvVarSource(secret_key_ref=V1SecretKeySelector(name=secret, key=key)))


def _volume(volume: Volume) -> V1Volume:
    if volume.claim:
        source = V1PersistentVolumeClaimVolumeSource(claim_name=volume.claim)
        return V1Volume(name=volume.name, persistent_volume_claim=source)
    if volume.nfs:
        nfs = V1NFSVolumeSource(server=volume.nfs.server, path=volume.nfs.path, read_only=volume.read_only)
        return V1Volume(name=volume.name, nfs=nfs)
    return V1Volume(name=volume.name, config_map=V1ConfigMapVolumeSource(name=volume.config_map))


def _shared_memory(pod: Pod) -> V1Volume:
    return V1Volume(name="shm", empty_dir=V1EmptyDirVolumeSource(medium="Memory", size_limit=pod.shared_memory))
