"""Stage 7: one page of what was learned and what was forgotten, as a file and as a Flyte Deck."""

from pathlib import Path

from flytekit import Deck, current_context, task
from flytekit.types.directory import FlyteDirectory
from flytekit.types.file import FlyteFile

from tasks import cluster
from tasks.artifacts import Recipe, is_local, local, one_line_errors, show


@task(
    **cluster.runs("report"),
    enable_deck=True,
    deck_fields=(),  # the report alone; flytekit's own fields ask pip, which need not be there
)
@one_line_errors
def report(
    config: Recipe,
    base: FlyteDirectory,
    data: FlyteDirectory,
    shards: FlyteDirectory,
    trained: FlyteDirectory,
    model: FlyteDirectory,
    base_scores: FlyteDirectory,
    tuned_scores: FlyteDirectory,
    smoke: FlyteDirectory | None,
    dial: FlyteDirectory | None,
    probe: FlyteDirectory | None,
) -> FlyteFile:
    """The page and its numbers, put into the run's output folder; a table for the terminal."""
    from controlllm.deliver import report as report_stage

    page = report_stage(
        config,
        base=local(base),
        data=local(data),
        shards=local(shards),
        trained=local(trained),
        model=local(model),
        base_scores=local(base_scores),
        tuned_scores=local(tuned_scores),
        smoke=None if smoke is None else local(smoke),
        dial=None if dial is None else local(dial),
        probe=None if probe is None else local(probe),
        started=current_context().execution_date,
    )
    Deck("report", page.read_text())
    if not is_local():
        show(lambda: _lineage(page.parent))
    return FlyteFile(str(page), remote_path=False if is_local() else None)


def _lineage(run: Path) -> dict[str, str]:
    from controlllm.decks import lineage_deck

    return {"lineage": lineage_deck(run)}
