"""The gate: the run's model is the tuned one only if nothing was forgotten beyond what the recipe allows."""

from pathlib import Path

from flytekit import task
from flytekit.types.directory import FlyteDirectory

from tasks import cluster
from tasks.artifacts import DECK, Folder, Recipe, is_local, local, one_line_errors, publish, show


@task(**cluster.runs("promote"), **DECK)
@one_line_errors
def promote(
    config: Recipe,
    model: FlyteDirectory,
    base_scores: FlyteDirectory,
    tuned_scores: FlyteDirectory,
    approved: bool,
) -> Folder:
    """The model, where `benchmark.gate` and whoever was asked let it pass; an error that says why where not."""
    from controlllm.promote import promote as promote_stage

    scores = {"base_scores": _kept(base_scores), "tuned_scores": _kept(tuned_scores)}
    kept = _kept(model)
    if not is_local():
        show(lambda: _page(config, kept, **scores))
    return publish(promote_stage(config, model=kept, **scores, approved=approved))


def _page(config: Recipe, model: Path, *, base_scores: Path, tuned_scores: Path) -> dict[str, str]:
    from controlllm.decks import gate_deck

    return {"gate": gate_deck(config.benchmark.model_dump(), base_scores, tuned_scores, model)}


def _kept(directory: FlyteDirectory) -> Path:
    """Where the folder outlives this pod: the run's folder only links to it."""
    from controlllm.adopt import adopt

    return local(directory) if is_local() else adopt(local(directory))
