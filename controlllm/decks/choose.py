"""Which page belongs to a folder, and which folder to a stage of a run."""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from controlllm.decks import benchmark, consolidate, gate, ingest, looks, prepare, train
from controlllm.decks.page import Page, render
from controlllm.errors import UserError
from controlllm.lineage.walk import parents_of
from controlllm.output import find_lineage, read_lineage
from controlllm.private import without_secrets

Json = dict[str, Any]
Places = Mapping[str, Path]
PAGES: dict[str, Callable[[Path, Json, Places], Page]] = {
    "ingest model": ingest.model_page,
    "ingest data": ingest.data_page,
    "prepare": prepare.page,
    "prepare piece": prepare.piece_page,
    "train": train.page,
    "consolidate": consolidate.page,
    "benchmark": benchmark.page,
    "benchmark task": benchmark.task_page,
    "dial": looks.dial_page,
}
WHOLE = {"probe": "probe.html", "smoke": "smoke.html", "report": "report.html"}
"""Stages whose output is a page of its own."""
STAGES = (*PAGES, *WHOLE, "gate")


def deck_of(folder: Path, *, places: Places | None = None) -> str:
    """The page of a stage's output, as HTML. UserError for a folder that is none.

    places: where its parents are by their role, if not in the store (`ingest model`: the tokenizer of a preview).
    """
    lineage = read_lineage(folder)
    stage = lineage["stage"]
    if stage in WHOLE and (folder / WHOLE[stage]).is_file():
        return without_secrets((folder / WHOLE[stage]).read_text(encoding="utf-8"))
    if stage not in PAGES:
        raise UserError(f"{folder}: there is no page for {stage}; known: {', '.join(STAGES)}")
    there = parents_of(lineage, folder) | dict(places or {})
    return render(PAGES[stage](folder, lineage, there))


def decks_of(folder: Path, inputs: Iterable[Path] = ()) -> dict[str, str]:
    """Pages by the name of a Deck: the stage's own, and what it was made from, as a graph.

    inputs: folders of outputs that it was made from and that are not in the store, as on a cluster.
    """
    here = {read_lineage(place)["stage"]: place for place in inputs}
    stage = read_lineage(folder)["stage"]
    return {stage: deck_of(folder, places=here), "lineage": lineage_deck(folder, here.values())}


def lineage_deck(target: Path, inputs: Iterable[Path] = ()) -> str:
    """What a run, or an output, was made from."""
    from controlllm.lineage import trace
    from controlllm.lineage.page import page_of

    return page_of(trace(target, places=[*inputs]))


def gate_deck(config: Json, base_scores: Path, tuned_scores: Path, model: Path) -> str:
    """The gate's decision about a model."""
    return render(gate.page(config, base_scores, tuned_scores, read_lineage(model)))


def folder_of(target: Path, stage: str | None) -> Callable[[], str]:
    """What makes the page: of a folder of the store, or of a run's stage (its report when none is named)."""
    if find_lineage(target) is not None and stage is None:
        return partial(deck_of, target)
    from controlllm.lineage import trace

    graph = trace(target)
    if stage == "gate":
        return partial(_gate_of, target)
    wanted = stage or "report"
    found = [node for node in graph.nodes.values() if wanted in (node.stage, node.title)]
    if not found:
        known = ", ".join(sorted({n.title for n in graph.nodes.values() if n.stage in STAGES} | {"gate"}))
        raise UserError(f"--stage: {target} has no {wanted}; it has {known}")
    if found[0].folder is None:
        raise UserError(f"--stage: the output of {wanted} is not here any more; run the stage again")
    return partial(deck_of, found[0].folder)


def _gate_of(run: Path) -> str:
    model = next((run / name for name in ("refused", "model") if (run / name / "config.json").is_file()), None)
    summary = run / "summary" / "summary.json"
    if model is None or not summary.is_file():
        raise UserError(f"{run}: has no model that a gate decided on; give a run's folder, runs/<name>")
    limits = json.loads(summary.read_text())["config"]["benchmark"]
    return gate_deck(limits, run / "base-scores", run / "scores", model)
