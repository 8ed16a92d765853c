"""Stage 7: the report, and the run's output folder: `<output>/<name>/` with the page and its numbers."""

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from controlllm.config import RunConfig
from controlllm.errors import UserError
from controlllm.fingerprint import content_of
from controlllm.promote import link
from controlllm.report import StageTime, build_report, print_summary
from controlllm.store import deliver_to, read_lineage, run_stage


def report(
    config: RunConfig,
    *,
    base: Path,
    data: Path,
    shards: Path,
    trained: Path,
    model: Path,
    base_scores: Path,
    tuned_scores: Path,
    smoke: Path | None,
    started: datetime,
    dial: Path | None = None,
    probe: Path | None = None,
) -> Path:
    """Build the page, put it into the output folder, print the summary; returns the page's path.

    dial, probe: folders with dial.json and probe.json, where these were measured.
    """
    output = Path(config.output) / config.name
    contrasts = {name: folder for name in config.report.contrast if (folder := _stored_report(config, name))}
    parents = {"benchmark of the base": base_scores, "benchmark of the tuned": tuned_scores, "train": trained}
    parents |= {"prepare": shards} | ({"smoke": smoke} if smoke else {})
    order = {"ingest model": base, "ingest data": data, "prepare": shards, "train": trained, "consolidate": model,
             "benchmark (base)": base_scores, "benchmark (tuned)": tuned_scores}  # fmt: skip
    order |= {"smoke": smoke} if smoke else {}
    more = {name: folder for name, folder in (("dial", dial), ("probe", probe)) if folder}
    order |= more
    memory = _predicted_memory(config, base, json.loads((trained / "train.json").read_text()))

    def build(folder: Path) -> None:
        build_report(
            folder,
            name=config.name,
            method=method(config),
            base_scores=base_scores,
            tuned_scores=tuned_scores,
            train=trained,
            prepare=shards,
            smoke=smoke,
            contrasts=contrasts,
            stages=[_stage_time(stage, path, started) for stage, path in order.items()],
            config=config.model_dump(exclude_none=True),
            memory=memory,
            **more,
        )

    # A contrast counts by its numbers: its page may name this run, and two pages must not renew each other for ever.
    numbers = {name: json.loads((folder / "summary.json").read_text()) for name, folder in contrasts.items()}
    inputs = {"run": config.model_dump(exclude={"output"}), "contrast": {n: content_of(v) for n, v in numbers.items()}}
    made = run_stage("report", config=inputs | {"memory": memory}, parents=parents | more, build=build)
    page = _deliver(made.path, output)
    print_summary(made.path, page)
    return page


def method(config: RunConfig) -> str:
    """What was done to the base, in a few words."""
    bits = f", frozen weights in {config.quantization.kind}" if config.quantization else ""
    return _trained(config) + bits


def _trained(config: RunConfig) -> str:
    control = config.control
    adapters = config.method.adapters
    if adapters and not control:
        return adapters
    if prompt := config.prompt:
        return f"{prompt.kind} tuning ({prompt.num_virtual_tokens} virtual tokens)"
    if config.partial:
        chosen = config.partial.blocks if isinstance(config.partial.blocks, str) else "chosen"
        return f"partial fine-tuning ({config.partial.num_blocks} blocks, {chosen})"
    if control is None:
        return "full fine-tuning"
    if control.layout == "stack":
        return f"Control LLM (stack, E = {control.num_expanded})"
    twins = f", twins of {adapters}" if adapters else ""
    how = f"{control.layout}-{control.interpolation}, {control.divergence}, E = {control.num_expanded}"
    return f"Control LLM ({how}{twins})"


def _predicted_memory(config: RunConfig, base: Path, trained: dict[str, Any]) -> int | None:
    """Bytes that a process was to need at its worst moment; None for a kind of model whose sizes are not known."""
    from controlllm.memory import predict
    from controlllm.model_shape import model_shape

    shape = model_shape(str(base))
    if shape is None or shape.decoder is None:
        return None
    cpu = trained["environment"]["cuda"] is None
    memory = predict(shape, config, processes=trained["processes"], device="cpu" if cpu else "cuda")
    return memory.device.total + (memory.host.total if cpu else 0)


def _stored_report(config: RunConfig, name: str) -> Path | None:
    """Another run's summary, if that run has been made and its numbers are there."""
    link = Path(config.output) / name / "summary"
    return link.resolve() if (link / "summary.json").exists() else None


def _stage_time(stage: str, path: Path, started: datetime) -> StageTime:
    lineage: dict[str, Any] = read_lineage(path)
    cached = datetime.fromisoformat(lineage["finished"]) < started.replace(microsecond=0)
    seconds = lineage["seconds"]
    if (scores := path / "scores.json").is_file():  # what is stored there was measured by a stage for each task
        seconds += json.loads(scores.read_text())["seconds"]
    return StageTime(stage, seconds, cached, lineage["key"], lineage["finished"])


def _deliver(made: Path, output: Path) -> Path:
    link(output / "summary", made)
    try:
        shutil.copyfile(made / "report.html", output / "report.html")
        deliver_to(output)
    except OSError as error:
        raise UserError(f"output: {output} cannot be written: {error.strerror}") from None
    return output / "report.html"
