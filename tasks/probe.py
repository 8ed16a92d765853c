"""A look inside the tuned model beside its base."""

from flytekit import task
from flytekit.types.directory import FlyteDirectory

from controlllm.config import ProbeConfig
from tasks import cluster
from tasks.artifacts import DECK, Folder, local, one_line_errors, publish, stage_cache


@task(
    cache=stage_cache("probe"),
    **cluster.runs("probe"),
    **DECK,
)
@one_line_errors
def probe(model: FlyteDirectory, base: FlyteDirectory, config: ProbeConfig | None) -> Folder | None:
    """Drift by layer and token, alphas, attention maps; nothing when the recipe has no probe section."""
    from controlllm.probe.stage import probe_stage

    return None if config is None else publish(probe_stage(local(model), local(base), config).path)
