"""The pipeline: `pyflyte run workflows/finetune.py finetune --config workflows/recipes/demo.yaml`.

Every task can be run alone, too: `pyflyte run workflows/finetune.py benchmark --help`; `from_train` and its like are
the rest of a run, from outputs that an earlier one made.
"""

from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

from flytekit import conditional, map_task, wait_for_input, workflow
from flytekit.types.directory import FlyteDirectory
from flytekit.types.file import FlyteFile

from controlllm.config import BenchmarkConfig
from tasks import cluster
from tasks.artifacts import Folder, Recipe
from tasks.benchmark import benchmark, benchmark_task, plan_benchmark
from tasks.consolidate import consolidate
from tasks.dial import dial
from tasks.ingest import ingest, preflight
from tasks.prepare import plan_pieces, prepare, prepare_piece
from tasks.probe import probe
from tasks.promote import promote
from tasks.report import report
from tasks.smoke import smoke
from tasks.train import train


class Finetuned(NamedTuple):
    model: Folder
    scores: Folder
    report: FlyteFile


@workflow
def measured(model: FlyteDirectory, data: FlyteDirectory, config: BenchmarkConfig) -> Folder:
    """Every task of the benchmark, each in a pod of its own; `benchmark` alone is all of them in one."""
    names = plan_benchmark(model=model, data=data, config=config)
    one = partial(benchmark_task, model=model, data=data, config=config)
    parts = map_task(one, min_success_ratio=0.1)(name=names)  # what is missing, `benchmark` measures
    return benchmark(model=model, data=data, config=config, parts=parts)


@workflow
def finetune(config: Recipe) -> Finetuned:
    """Ingest, prepare, train, consolidate, benchmark, smoke test, report, gate. What did not change is cached."""
    return pipeline(config)


def pipeline(config: Any, *, fresh: bool = False) -> Finetuned:
    """The nodes of a whole run; fresh: the sources are looked at again, whatever Flyte has cached of them."""
    checked = preflight(config=config)
    raw = ingest(model=config.model, mix=config.mix, benchmark=config.benchmark, pack=config.pack)
    if fresh:
        raw.with_overrides(cache=False)
    checked.name >> raw.base  # order: a run that cannot work ends before it begins
    return _after_ingest(config, checked.approval, raw.base, raw.data)


@workflow
def from_prepare(config: Recipe, base: FlyteDirectory, data: FlyteDirectory) -> Finetuned:
    """All but ingest."""
    return _after_ingest(config, preflight(config=config).approval, base, data)


@workflow
def from_train(config: Recipe, base: FlyteDirectory, data: FlyteDirectory, shards: FlyteDirectory) -> Finetuned:
    """Training, and what follows it."""
    return _after_prepare(config, preflight(config=config).approval, base, data, shards)


@workflow
def from_consolidate(
    config: Recipe, base: FlyteDirectory, data: FlyteDirectory, shards: FlyteDirectory, trained: FlyteDirectory
) -> Finetuned:
    """What follows training."""
    return _after_train(config, preflight(config=config).approval, base, data, shards, trained)


@workflow
def from_benchmark(
    config: Recipe,
    base: FlyteDirectory,
    data: FlyteDirectory,
    shards: FlyteDirectory,
    trained: FlyteDirectory,
    model: FlyteDirectory,
) -> Finetuned:
    """All measurements, the report and the gate."""
    approval = preflight(config=config).approval
    return _after_consolidate(config, approval, base, data, shards, trained, model)


def _after_ingest(config: Any, approval: Any, base: Any, data: Any) -> Finetuned:
    pieces = plan_pieces(data=data, mix=config.mix, pack=config.pack)
    piece = partial(prepare_piece, base=base, data=data, mix=config.mix, pack=config.pack)
    parts = map_task(piece, min_success_ratio=0.9)(piece=pieces)  # what a lost pod leaves out, `prepare` makes
    shards = prepare(
        base=base,
        data=data,
        mix=config.mix,
        pack=config.pack,
        validation=config.validation,
        parts=parts,
    )
    return _after_prepare(config, approval, base, data, shards)


def _after_prepare(config: Any, approval: Any, base: Any, data: Any, shards: Any) -> Finetuned:
    trained = train(
        base=base,
        shards=shards,
        model=config.model,
        control=config.control,
        lora=config.lora,
        ia3=config.ia3,
        prompt=config.prompt,
        partial=config.partial,
        quantization=config.quantization,
        mix=config.mix,
        config=config.train,
        validation=config.validation,
    )
    return _after_train(config, approval, base, data, shards, trained)


def _after_train(config: Any, approval: Any, base: Any, data: Any, shards: Any, trained: Any) -> Finetuned:
    model = consolidate(
        base=base,
        trained=trained,
        control=config.control,
        lora=config.lora,
        ia3=config.ia3,
        prompt=config.prompt,
        partial=config.partial,
        quantization=config.quantization,
        export=config.export,
    )
    return _after_consolidate(config, approval, base, data, shards, trained, model)


def _after_consolidate(
    config: Any, approval: Any, base: Any, data: Any, shards: Any, trained: Any, model: Any
) -> Finetuned:
    base_scores = measured(model=base, data=data, config=config.benchmark)
    tuned_scores = measured(model=model, data=data, config=config.benchmark)
    smoked = smoke(model=model, data=data, config=config.smoke)
    dialled = dial(
        model=model,
        data=data,
        benchmark=config.benchmark,
        config=config.report,
        base_scores=base_scores,
        tuned_scores=tuned_scores,
    )
    probed = probe(model=model, base=base, config=config.probe)
    page = report(
        config=config,
        base=base,
        data=data,
        shards=shards,
        trained=trained,
        model=model,
        base_scores=base_scores,
        tuned_scores=tuned_scores,
        smoke=smoked,
        dial=dialled,
        probe=probed,
    )
    judged = {"config": config, "model": model, "base_scores": base_scores, "tuned_scores": tuned_scores}
    promoted = (
        conditional("promotion")
        .if_(approval.is_true())
        .then(promote_if_approved(**judged))
        .else_()
        .then(promote(**judged, approved=True))
    )
    page >> promoted  # order: a model that the gate stops has its report
    return Finetuned(model=promoted, scores=tuned_scores, report=page)


@workflow
def promote_if_approved(
    config: Recipe, model: FlyteDirectory, base_scores: FlyteDirectory, tuned_scores: FlyteDirectory
) -> Folder:
    """The gate, behind a person's answer: in the console, or by `controlllm runs approve`."""
    hours = cluster.profile().launch.approval_hours
    approved = wait_for_input("approval", timeout=timedelta(hours=hours), expected_type=bool)
    return promote(config=config, model=model, base_scores=base_scores, tuned_scores=tuned_scores, approved=approved)
