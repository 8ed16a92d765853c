"""The last step: `<output>/<name>/model` becomes the tuned model, unless the gate says that too much was lost."""

import os
import re
from pathlib import Path

from controlllm.config import RunConfig
from controlllm.config.launch import DATED
from controlllm.errors import UserError
from controlllm.gate import check_gate
from controlllm.progress import console
from controlllm.statistics import compare_scores
from controlllm.store import deliver_to


def promote(config: RunConfig, *, model: Path, base_scores: Path, tuned_scores: Path, approved: bool = True) -> Path:
    """Link `model`, and both models' results as `scores` and `base-scores`; returns the folder that `model` names.

    A model that `benchmark.gate` or a person (`approved`) does not let pass is linked as `refused`, an earlier `model`
    stays, and the UserError says what was lost.
    """
    output = Path(config.output) / config.name
    link(output / "base-scores", base_scores)
    link(output / "scores", tuned_scores)
    comparison = compare_scores(base_scores, tuned_scores, margin=config.benchmark.margin)
    try:
        check_gate(comparison, config.benchmark.gate)
        if not approved:
            raise UserError(f"promote.approval: the model of {config.name} was not approved; an earlier one stays")
    except UserError:
        link(output / "refused", model)
        raise
    link(output / "model", model)
    (output / "refused").unlink(missing_ok=True)
    deliver_to(output)
    return model


def asks(config: RunConfig, *, someone: bool) -> bool:
    """Whether a person decides on promotion; a recipe that wants it is told where there is nobody to ask."""
    if config.promote.approval and not someone:
        console.print("[dim]promote.approval: a run on this machine asks nobody, the gate alone decides[/]")
    return config.promote.approval and someone


def promoted(config: RunConfig) -> Path:
    """The model that the recipe's runs promoted last, dated ones included. UserError where none was."""
    runs = Path(config.output)
    found = [link for link in runs.glob(f"{config.name}*/model") if _of(config.name, link) and link.exists()]
    if not found:
        raise UserError(f"checkpoint: no run of {config.name} promoted a model in {runs} yet; name a checkpoint")
    return max(found, key=lambda link: link.lstat().st_mtime)


def _of(name: str, link: Path) -> bool:
    """Whether a run's folder is that of the recipe, or of one of its scheduled runs."""
    return link.parent.name == name or re.fullmatch(f"{re.escape(name[:47])}{DATED}", link.parent.name) is not None


def link(name: Path, target: Path) -> None:
    """Replaced in one step, so that it always points somewhere. UserError where it cannot be written."""
    fresh = name.with_name(f".{name.name}.{os.getpid()}")
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        fresh.symlink_to(target.resolve())
        fresh.replace(name)
    except OSError as error:
        raise UserError(f"output: {name.parent} cannot be written: {error.strerror}") from None
