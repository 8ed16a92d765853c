"""Stage 5: lm-evaluation-harness, for the base and for the tuned model."""

from flytekit import task
from flytekit.types.directory import FlyteDirectory

from controlllm.config import BenchmarkConfig
from tasks import cluster
from tasks.artifacts import Folder, local, one_line_errors, publish, stage_cache


@task(
    cache=stage_cache("benchmark"),
    container_image=cluster.image("train"),
    requests=cluster.light(),
    environment=cluster.environment(),
)
@one_line_errors
def benchmark(model: FlyteDirectory, data: FlyteDirectory, config: BenchmarkConfig) -> Folder:
    """Scores, and a log of every item."""
    from controlllm.benchmark import benchmark as benchmark_stage

    return publish(benchmark_stage(local(model), local(data), config).path)
