"""Stage 5: lm-evaluation-harness, for the base and for the tuned model; on a cluster each task has a pod of its own."""

from flytekit import task
from flytekit.types.directory import FlyteDirectory

from controlllm.config import BenchmarkConfig
from tasks import cluster
from tasks.artifacts import DECK, Folder, is_local, local, one_line_errors, publish, stage_cache


@task(cache=stage_cache("benchmark task", "benchmark"), **cluster.runs("plan_benchmark"))
@one_line_errors
def plan_benchmark(model: FlyteDirectory, data: FlyteDirectory, config: BenchmarkConfig) -> list[str]:
    """The tasks that pods measure; none here, where one process loads the model once for all of them."""
    from controlllm.benchmark.stage import task_names

    return [] if is_local() else task_names(local(model), local(data), config)


@task(cache=stage_cache("benchmark task"), **cluster.runs("benchmark_task"))
@one_line_errors
def benchmark_task(name: str, model: FlyteDirectory, data: FlyteDirectory, config: BenchmarkConfig) -> FlyteDirectory:
    """Score and items of one task."""
    from controlllm.benchmark.stage import benchmark_task as benchmark_task_stage

    return publish(benchmark_task_stage(name, local(model), local(data), config))


@task(cache=stage_cache("benchmark task", "benchmark"), **cluster.runs("benchmark"), **DECK)
@one_line_errors
def benchmark(
    model: FlyteDirectory,
    data: FlyteDirectory,
    config: BenchmarkConfig,
    parts: list[FlyteDirectory | None] = [],  # noqa: B006 - Flyte reads it, nobody changes it
) -> Folder:
    """Scores, and a log of every item, out of what pods measured; what is missing is measured here.

    Every task is tried; one that failed ends it with what and why.
    """
    from controlllm.benchmark.stage import gather, refuse_failed

    there = [local(part) for part in parts if part is not None]
    scores = gather(there, local(model), local(data), config).path
    refuse_failed(scores)
    return publish(scores)
