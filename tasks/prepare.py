"""Stage 2: packed rows."""

from flytekit import task
from flytekit.types.directory import FlyteDirectory

from controlllm.config import PackConfig
from tasks import cluster
from tasks.artifacts import Folder, local, one_line_errors, publish, stage_cache


@task(
    cache=stage_cache("prepare"),
    container_image=cluster.image("train"),
    requests=cluster.light(),
    environment=cluster.environment(),
)
@one_line_errors
def prepare(base: FlyteDirectory, data: FlyteDirectory, pack: PackConfig) -> Folder:
    """Chat template, targets, packing: Arrow shards."""
    from controlllm.prepare import prepare as prepare_stage

    return publish(prepare_stage(local(base), local(data), pack).path)
