"""The last step: `<output>/<name>/model` becomes the tuned model, unless the gate says that too much was lost."""

import os
from pathlib import Path

from controlllm.config import RunConfig
from controlllm.errors import UserError
from controlllm.gate import check_gate
from controlllm.statistics import compare_scores
from controlllm.store import deliver_to


def promote(config: RunConfig, *, model: Path, base_scores: Path, tuned_scores: Path) -> Path:
    """Link `model`, and both models' results as `scores` and `base-scores`; returns the folder that `model` names.

    A model that `benchmark.gate` does not let pass is linked as `refused`, an earlier `model` stays, and the UserError
    says what was lost.
    """
    output = Path(config.output) / config.name
    link(output / "base-scores", base_scores)
    link(output / "scores", tuned_scores)
    comparison = compare_scores(base_scores, tuned_scores, margin=config.benchmark.margin)
    try:
        check_gate(comparison, config.benchmark.gate)
    except UserError:
        link(output / "refused", model)
        raise
    link(output / "model", model)
    (output / "refused").unlink(missing_ok=True)
    deliver_to(output)
    return model


def link(name: Path, target: Path) -> None:
    """Replaced in one step, so that it always points somewhere. UserError where it cannot be written."""
    fresh = name.with_name(f".{name.name}.{os.getpid()}")
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        fresh.symlink_to(target.resolve())
        fresh.replace(name)
    except OSError as error:
        raise UserError(f"output: {name.parent} cannot be written: {error.strerror}") from None
