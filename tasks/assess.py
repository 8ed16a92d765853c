"""A checkpoint that was not trained in this run, as it is needed to be measured."""

from flytekit import task
from flytekit.types.directory import FlyteDirectory
from flytekit.types.file import FlyteFile

from tasks import cluster
from tasks.artifacts import Folder, Recipe, is_local, local, one_line_errors, publish


@task(**cluster.runs("fetch"))
@one_line_errors
def fetch(config: Recipe, checkpoint: str) -> Folder:
    """A folder that the pods see, or one of the Hub; empty: what the recipe's runs promoted last.

    Not cached by Flyte: what a name stands for changes. The store notices what did not.
    """
    from controlllm.ingest import ingest_model
    from controlllm.promote import promoted

    name = checkpoint or str(promoted(config))
    return publish(ingest_model(config.model.model_copy(update={"name": name, "revision": None})).path)


@task(**cluster.runs("assessment"))
@one_line_errors
def assessment(
    config: Recipe,
    checkpoint: str,
    base_scores: FlyteDirectory,
    scores: FlyteDirectory,
    smoke: FlyteDirectory | None,
) -> FlyteFile:
    """One page: what the checkpoint can do beside the recipe's base model."""
    from controlllm.assessment import write_assessment

    page = write_assessment(
        config,
        checkpoint,
        base_scores=local(base_scores),
        scores=local(scores),
        smoke=None if smoke is None else local(smoke),
    )
    return FlyteFile(str(page), remote_path=False if is_local() else None)
