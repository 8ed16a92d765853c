"""Cluster profiles as tables for the terminal."""

from rich.console import Console
from rich.table import Table

from controlllm.config.cluster import PROFILES, Profile, load_profile, profile_names
from controlllm.config.pods import PODS, Pod, TrainPod


def print_profiles() -> None:
    """One line each: its size, and what its file says of it."""
    table = _table("profile", "training", "GPUs", "what it is")
    for name in profile_names():
        profile = load_profile(name)
        gpus = profile.train.nodes * profile.train.pod_gpus
        table.add_row(name, _processes(profile.train), str(gpus or "–"), _comment(name))
    Console().print(table)


def print_pods(profile: Profile) -> None:
    """One line for each task, and what all of them share."""
    table = _table("task", "pod", "image", "CPUs", "memory", "GPUs", "tries", "hours", "queue")
    for task, kind in PODS.items():
        pod = profile.pod(task)
        table.add_row(task, kind, *_asks(pod))
    console = Console()
    console.print(table)
    shared = {
        "training": f"{_processes(profile.train)}, as a {_job(profile.train)}",
        "cache": profile.cache or "each pod's own disk",
        "checkpoints": profile.checkpoints or "in the cache",
        "volumes": ", ".join(volume.mount for volume in profile.volumes) or "none",
        "secrets": ", ".join(profile.secrets) or "none",
    }
    for name, said in shared.items():
        console.print(f"{name:<12} {said}", markup=False, highlight=False)


def _table(*columns: str) -> Table:
    table = Table(show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _asks(pod: Pod) -> list[str]:
    kind = pod.node_selector.get("nvidia.com/gpu.product", "")
    gpus = f"{pod.pod_gpus} {kind}".strip() if pod.pod_gpus else "–"
    tries = f"{1 + pod.retries}{', spot' if pod.interruptible else ''}"
    hours = "–" if pod.timeout_hours is None else f"{pod.timeout_hours:g}"
    return [pod.image, pod.cpu, pod.memory, gpus, tries, hours, pod.queue.name if pod.queue else "–"]


def _processes(pod: TrainPod) -> str:
    if pod.nodes == 1:
        return f"{pod.processes_per_node} process{'es' if pod.processes_per_node > 1 else ''}"
    return f"{pod.nodes} nodes × {pod.processes_per_node} processes"


def _job(pod: TrainPod) -> str:
    return "plain pod" if pod.nodes == 1 else "PyTorchJob"


def _comment(name: str) -> str:
    """The first sentence of the file."""
    lines = (PROFILES / f"{name}.yaml").read_text().splitlines()
    text = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    return text.partition(". ")[0].rstrip(".")
