"""Stage 1: the base model and the data."""

from typing import NamedTuple

from flytekit import task

from controlllm.config import BenchmarkConfig, MixConfig, ModelConfig, PackConfig
from tasks import cluster
from tasks.artifacts import Folder, Recipe, is_local, one_line_errors, publish, stage_cache


class Ingested(NamedTuple):
    base: Folder
    data: Folder


@task(**cluster.runs("preflight"))
@one_line_errors
def preflight(config: Recipe) -> str:
    """Refuse at once what cannot work; returns the run's name."""
    from controlllm.preflight import check

    check(config, serving=is_local())
    return config.name


@task(
    cache=stage_cache("ingest model", "ingest data"),
    **cluster.runs("ingest"),
)
@one_line_errors
def ingest(model: ModelConfig, mix: MixConfig, benchmark: BenchmarkConfig, pack: PackConfig) -> Ingested:
    """Base model as safetensors; the training data's files and pieces; items to measure with as JSON lines."""
    from controlllm.ingest import ingest_data, ingest_model

    base = ingest_model(model).path
    return Ingested(publish(base), publish(ingest_data(base, mix, benchmark, pack).path))
