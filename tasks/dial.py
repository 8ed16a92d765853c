"""The tuned model turned down: what each alpha scale that `report.dial` names brings and costs."""

from flytekit import task
from flytekit.types.directory import FlyteDirectory

from controlllm.config import BenchmarkConfig, ReportConfig
from tasks import cluster
from tasks.artifacts import DECK, Folder, local, one_line_errors, publish, stage_cache


@task(
    cache=stage_cache("benchmark task", "dial"),
    **cluster.runs("dial"),
    **DECK,
)
@one_line_errors
def dial(
    model: FlyteDirectory,
    data: FlyteDirectory,
    benchmark: BenchmarkConfig,
    config: ReportConfig,
    base_scores: FlyteDirectory,
    tuned_scores: FlyteDirectory,
) -> Folder | None:
    """Scores between the base and the tuned model; nothing when the recipe names no scale."""
    from controlllm.dial_stage import dial_stage

    if not config.dial:
        return None
    scores = {"base_scores": local(base_scores), "tuned_scores": local(tuned_scores)}
    return publish(dial_stage(local(model), local(data), benchmark, config.dial, **scores).path)
