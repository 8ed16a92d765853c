"""The gate: the run's model is the tuned one only if nothing was forgotten beyond what the recipe allows."""

from flytekit import task
from flytekit.types.directory import FlyteDirectory

from tasks import cluster
from tasks.artifacts import Folder, Recipe, local, one_line_errors, publish


@task(**cluster.runs("promote"))
@one_line_errors
def promote(config: Recipe, model: FlyteDirectory, base_scores: FlyteDirectory, tuned_scores: FlyteDirectory) -> Folder:
    """The model, where `benchmark.gate` lets it pass; an error that says what was lost where not."""
    from controlllm.promote import promote as promote_stage

    made = promote_stage(config, model=local(model), base_scores=local(base_scores), tuned_scores=local(tuned_scores))
    return publish(made)
