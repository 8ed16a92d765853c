"""Stage 5: lm-evaluation-harness, for the base and for the tuned model."""

from flytekit import task
from flytekit.types.directory import FlyteDirectory

from controlllm.config import BenchmarkConfig
from tasks import cluster
from tasks.artifacts import Folder, local, one_line_errors, publish, stage_cache


@task(
    cache=stage_cache("benchmark task", "benchmark"),
    **cluster.runs("benchmark"),
)
@one_line_errors
def benchmark(model: FlyteDirectory, data: FlyteDirectory, config: BenchmarkConfig) -> Folder:
    """Scores, and a log of every item. Every task is tried; one that failed ends it with what and why."""
    from controlllm.benchmark import benchmark as benchmark_stage
    from controlllm.benchmark.stage import refuse_failed

    scores = benchmark_stage(local(model), local(data), config).path
    refuse_failed(scores)
    return publish(scores)
