"""The stages in order, each from the store where nothing changed: what `controlllm <stage>` runs.

The Flyte tasks call the same functions; this is the pipeline without Flyte.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from controlllm.config import BenchmarkConfig, RunConfig
from controlllm.preflight import check
from controlllm.store import Output

STAGES = ("ingest", "prepare", "train", "consolidate", "benchmark", "smoke", "report")


@dataclass
class Made:
    """The folders of a run so far."""

    base: Path
    data: Path
    shards: Path | None = None
    trained: Path | None = None
    model: Path | None = None
    base_scores: Path | None = None
    tuned_scores: Path | None = None
    smoke: Path | None = None
    dial: Path | None = None
    probe: Path | None = None


def run(config: RunConfig, *, until: str = "report") -> None:
    """Run every stage up to `until`. Raises UserError before anything starts when the config cannot work."""
    check(config)
    started = datetime.now(UTC)
    made = _ingest(config)
    for stage in STAGES[1 : STAGES.index(until) + 1]:
        _STEPS[stage](config, made, started)


def _ingest(config: RunConfig) -> Made:
    from controlllm.ingest import ingest_data, ingest_model

    base = ingest_model(config.model).path
    return Made(base, ingest_data(base, config.mix, config.benchmark, config.pack).path)


def _prepare(config: RunConfig, made: Made, started: datetime) -> None:
    from controlllm.prepare import prepare

    made.shards = prepare(made.base, made.data, config.mix, config.pack, config.validation).path


def _train(config: RunConfig, made: Made, started: datetime) -> None:
    from controlllm.train.stage import train

    made.trained = train(
        made.base,
        _present(made.shards),
        model=config.model,
        method=config.method,
        mix=config.mix,
        config=config.train,
        validation=config.validation,
    )


def _consolidate(config: RunConfig, made: Made, started: datetime) -> None:
    from controlllm.consolidate import consolidate

    made.model = consolidate(made.base, _present(made.trained), config.method, config.export).path


def _benchmark(config: RunConfig, made: Made, started: datetime) -> None:
    from controlllm.benchmark.stage import refuse_failed

    made.base_scores = _score(made.base, made.data, config.benchmark).path
    made.tuned_scores = _score(_present(made.model), made.data, config.benchmark).path
    refuse_failed(made.base_scores, made.tuned_scores)


def _score(model: Path, data: Path, config: BenchmarkConfig) -> Output:
    from controlllm.benchmark import benchmark

    return benchmark(model, data, config)


def _smoke(config: RunConfig, made: Made, started: datetime) -> None:
    from controlllm.smoke.stage import smoke

    if config.smoke is not None:
        made.smoke = smoke(_present(made.model), made.data, config.smoke).path


def _looks(config: RunConfig, made: Made) -> None:
    """What the report shows beside scores, where the recipe asks for it."""
    if config.report.dial:
        from controlllm.dial_stage import dial_stage

        scores = {"base_scores": _present(made.base_scores), "tuned_scores": _present(made.tuned_scores)}
        made.dial = dial_stage(_present(made.model), made.data, config.benchmark, config.report.dial, **scores).path
    if config.probe:
        from controlllm.probe.stage import probe_stage

        made.probe = probe_stage(_present(made.model), made.base, config.probe).path


def _report(config: RunConfig, made: Made, started: datetime) -> None:
    from controlllm.deliver import report
    from controlllm.promote import asks, promote

    asks(config, someone=False)
    _looks(config, made)
    report(
        config,
        base=made.base,
        data=made.data,
        shards=_present(made.shards),
        trained=_present(made.trained),
        model=_present(made.model),
        base_scores=_present(made.base_scores),
        tuned_scores=_present(made.tuned_scores),
        smoke=made.smoke,
        dial=made.dial,
        probe=made.probe,
        started=started,
    )
    promote(
        config,
        model=_present(made.model),
        base_scores=_present(made.base_scores),
        tuned_scores=_present(made.tuned_scores),
    )


def _present(path: Path | None) -> Path:
    assert path is not None, "stages run in order"
    return path


_STEPS: dict[str, Callable[[RunConfig, Made, datetime], None]] = {
    "prepare": _prepare,
    "train": _train,
    "consolidate": _consolidate,
    "benchmark": _benchmark,
    "smoke": _smoke,
    "report": _report,
}
