"""Stage 1: the base model and the data."""

from typing import NamedTuple

from flytekit import task

from controlllm.config import BenchmarkConfig, MixConfig, ModelConfig, PackConfig
from tasks import cluster
from tasks.artifacts import DECK, Folder, Recipe, is_local, one_line_errors, publish, stage_cache


class Checked(NamedTuple):
    name: str
    approval: bool


class Ingested(NamedTuple):
    base: Folder
    data: Folder


@task(**cluster.runs("preflight"))
@one_line_errors
def preflight(config: Recipe) -> Checked:
    """Refuse at once what cannot work; returns the run's name, and whether a person is asked before promotion."""
    from controlllm.preflight import check
    from controlllm.promote import asks

    check(config, serving=is_local())
    return Checked(config.name, asks(config, someone=not is_local()))


@task(
    cache=stage_cache("ingest model", "ingest data"),
    **cluster.runs("ingest"),
    **DECK,
)
@one_line_errors
def ingest(model: ModelConfig, mix: MixConfig, benchmark: BenchmarkConfig, pack: PackConfig) -> Ingested:
    """Base model as safetensors; the training data's files and pieces; items to measure with as JSON lines."""
    from controlllm.ingest import ingest_data, ingest_model

    base = ingest_model(model).path
    return Ingested(publish(base), publish(ingest_data(base, mix, benchmark, pack).path))
