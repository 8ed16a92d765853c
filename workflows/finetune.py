"""The pipeline: `pyflyte run workflows/finetune.py finetune --config workflows/recipes/demo.yaml`.

Every task can be run alone, too: `pyflyte run workflows/finetune.py benchmark --help`.
"""

from functools import partial
from typing import NamedTuple

from flytekit import map_task, workflow
from flytekit.types.directory import FlyteDirectory
from flytekit.types.file import FlyteFile

from controlllm.config import BenchmarkConfig
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
    checked = preflight(config=config)
    raw = ingest(model=config.model, mix=config.mix, benchmark=config.benchmark, pack=config.pack)
    checked >> raw.base  # order: a run that cannot work ends before it begins
    pieces = plan_pieces(data=raw.data, mix=config.mix, pack=config.pack)
    piece = partial(prepare_piece, base=raw.base, data=raw.data, mix=config.mix, pack=config.pack)
    parts = map_task(piece, min_success_ratio=0.9)(piece=pieces)  # what a lost pod leaves out, `prepare` makes
    shards = prepare(
        base=raw.base,
        data=raw.data,
        mix=config.mix,
        pack=config.pack,
        validation=config.validation,
        parts=parts,
    )
    trained = train(
        base=raw.base,
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
    model = consolidate(
        base=raw.base,
        trained=trained,
        control=config.control,
        lora=config.lora,
        ia3=config.ia3,
        prompt=config.prompt,
        partial=config.partial,
        quantization=config.quantization,
        export=config.export,
    )
    base_scores = measured(model=raw.base, data=raw.data, config=config.benchmark)
    tuned_scores = measured(model=model, data=raw.data, config=config.benchmark)
    smoked = smoke(model=model, data=raw.data, config=config.smoke)
    dialled = dial(
        model=model,
        data=raw.data,
        benchmark=config.benchmark,
        config=config.report,
        base_scores=base_scores,
        tuned_scores=tuned_scores,
    )
    probed = probe(model=model, base=raw.base, config=config.probe)
    page = report(
        config=config,
        base=raw.base,
        data=raw.data,
        shards=shards,
        trained=trained,
        model=model,
        base_scores=base_scores,
        tuned_scores=tuned_scores,
        smoke=smoked,
        dial=dialled,
        probe=probed,
    )
    promoted = promote(config=config, model=model, base_scores=base_scores, tuned_scores=tuned_scores)
    page >> promoted  # order: a model that the gate stops has its report
    return Finetuned(model=promoted, scores=tuned_scores, report=page)
