"""A checkpoint measured without a training: `pyflyte run workflows/assess.py assess --config RECIPE --checkpoint X`."""

from typing import NamedTuple

from flytekit import workflow
from flytekit.types.file import FlyteFile

from tasks.artifacts import Folder, Recipe
from tasks.assess import assessment, fetch
from tasks.ingest import ingest
from tasks.smoke import smoke
from workflows.finetune import measured


class Assessed(NamedTuple):
    scores: Folder
    page: FlyteFile


@workflow
def assess(config: Recipe, checkpoint: str = "") -> Assessed:
    """Benchmark and smoke test of any Hugging Face checkpoint beside the recipe's base, on one page.

    checkpoint: a folder that the pods see, or a name on the Hub; what the recipe's runs promoted last when left out.
    """
    raw = ingest(model=config.model, mix=config.mix, benchmark=config.benchmark, pack=config.pack)
    model = fetch(config=config, checkpoint=checkpoint)
    base_scores = measured(model=raw.base, data=raw.data, config=config.benchmark)
    scores = measured(model=model, data=raw.data, config=config.benchmark)
    smoked = smoke(model=model, data=raw.data, config=config.smoke)
    page = assessment(config=config, checkpoint=checkpoint, base_scores=base_scores, scores=scores, smoke=smoked)
    return Assessed(scores=scores, page=page)


@workflow
def smoke_test(config: Recipe, checkpoint: str = "") -> Folder | None:
    """Whether vLLM gives a checkpoint's tokens, and nothing else."""
    raw = ingest(model=config.model, mix=config.mix, benchmark=config.benchmark, pack=config.pack)
    return smoke(model=fetch(config=config, checkpoint=checkpoint), data=raw.data, config=config.smoke)
