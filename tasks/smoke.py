"""Stage 6: a real vLLM engine must give the tokens that transformers gives."""

from flytekit import task
from flytekit.types.directory import FlyteDirectory

from controlllm.config import SmokeConfig
from tasks import cluster
from tasks.artifacts import DECK, Folder, local, one_line_errors, publish, stage_cache


@task(
    cache=stage_cache("smoke"),
    **cluster.runs("smoke"),
    **DECK,
)
@one_line_errors
def smoke(model: FlyteDirectory, data: FlyteDirectory, config: SmokeConfig | None) -> Folder | None:
    """Greedy tokens of vLLM and transformers, compared; nothing when the recipe has no smoke section."""
    from controlllm.smoke.stage import smoke as smoke_stage

    return None if config is None else publish(smoke_stage(local(model), local(data), config).path)
