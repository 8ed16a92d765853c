"""What a schedule's tick does before its run."""

from datetime import datetime

from flytekit import task

from tasks import cluster
from tasks.artifacts import Recipe, one_line_errors


@task(**cluster.runs("for_tick"))
@one_line_errors
def for_tick(config: Recipe, kickoff: datetime) -> Recipe:
    """The recipe with the tick's time in its name, so that no two ticks write one place."""
    from controlllm.config.launch import dated

    return config.model_copy(update={"name": dated(config.name, kickoff)})
